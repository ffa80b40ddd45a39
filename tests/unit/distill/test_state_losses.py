"""The losses of states against sums written out token by token, with masks that hide zeros and NaNs."""

import pytest
import torch

from nemo_minitron.distill.state_losses import cosine_of_states, mse_of_states, relation_kl

S, B, H = 5, 3, 8


@pytest.fixture
def states():
    student, teacher = torch.randn(2, S, B, H, dtype=torch.float64)
    valid = torch.rand(S, B) > 0.3
    return student.requires_grad_(), teacher, valid


def test_cosine_and_mse(states):
    student, teacher, valid = states
    cosine = mse = 0.0
    for s, b in valid.nonzero().tolist():
        own, other = student[s, b], teacher[s, b]
        cosine += 1 - own @ other / (own.norm() * other.norm())
        mse += ((own - other) ** 2).sum() / H
    assert cosine_of_states(student, teacher, valid).item() == pytest.approx(float(cosine), rel=1e-12)
    assert mse_of_states(student, teacher, valid).item() == pytest.approx(float(mse), rel=1e-12)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relations_look_back_only(heads):
    student, teacher = torch.randn(S, B, 8, dtype=torch.float64), torch.randn(S, B, 12, dtype=torch.float64)
    valid = torch.rand(S, B) > 0.3
    expected = 0.0
    for s, b in valid.nonzero().tolist():
        for head in range(heads):
            log_probs = []
            for states in (student, teacher):
                part = states[:, b].chunk(heads, dim=1)[head]
                log_probs.append(torch.log_softmax(part[: s + 1] @ part[s] / part.shape[1] ** 0.5, 0))
            expected += (log_probs[1].exp() * (log_probs[1] - log_probs[0])).sum()
    found = relation_kl(student, teacher, valid, relation_heads=heads)
    assert found.item() == pytest.approx(float(expected), rel=1e-12)
    changed = student.clone()
    changed[3:] = torch.randn(2, B, 8, dtype=torch.float64)
    before = valid.clone()
    before[3:] = False
    assert torch.equal(relation_kl(changed, teacher, before, relation_heads=heads),
                       relation_kl(student, teacher, before, relation_heads=heads))


def test_relations_stay_inside_documents():
    """Packed documents cost what each costs alone; padding (0) counts for nothing."""
    student, teacher = torch.randn(S, B, 8, dtype=torch.float64), torch.randn(S, B, 12, dtype=torch.float64)
    document_ids = torch.tensor([[1, 1, 2, 2, 2], [1, 2, 2, 0, 0], [1, 1, 1, 1, 1]])
    valid = document_ids.t() != 0
    expected = 0.0
    for row in range(B):
        for number in set(document_ids[row].tolist()) - {0}:
            own = document_ids[row] == number
            parts = [states[own, row].unsqueeze(1) for states in (student, teacher)]
            expected += relation_kl(*parts, torch.ones(int(own.sum()), 1, dtype=torch.bool), relation_heads=2).item()
    found = relation_kl(student, teacher, valid, relation_heads=2, document_ids_BS=document_ids)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert found.item() != pytest.approx(relation_kl(student, teacher, valid, relation_heads=2).item(), rel=1e-3)


@pytest.mark.parametrize("loss", [cosine_of_states, mse_of_states])
def test_what_is_masked_has_no_part(states, loss):
    """Not its NaNs, not its zeros, whose norm has no gradient; nothing valid gives zero."""
    student, teacher, valid = states
    dirty = torch.where(valid.unsqueeze(-1), student.detach(), torch.nan).requires_grad_()
    loss(student, teacher, valid).backward()
    loss(dirty, torch.where(valid.unsqueeze(-1), teacher, 0.0), valid).backward()
    assert torch.equal(dirty.grad, student.grad)
    assert (student.grad[~valid] == 0).all() and (student.grad[valid] != 0).any()
    nothing = loss(dirty, teacher, torch.zeros_like(valid))
    assert nothing.item() == 0


def test_equal_states_cost_nothing(states):
    student, _, valid = states
    assert cosine_of_states(student, student, valid).item() == pytest.approx(0, abs=1e-12)
    assert mse_of_states(student, student, valid).item() == 0
    assert relation_kl(student, student, valid, relation_heads=2).item() == pytest.approx(0, abs=1e-12)
