"""`fused_linear_loss` on one process against the plain formulas of `losses` and their autograd gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_minitron.distill.fused_kl import fused_linear_loss
from nemo_minitron.distill.losses import (
    LossWeights,
    cosine_distance,
    cross_entropy,
    forward_kl,
    jensen_shannon,
    mean_squared_error,
    reverse_kl,
)

NUM_TOKENS, VOCAB, PADDED_VOCAB, STUDENT_HIDDEN, TEACHER_HIDDEN = 23, 37, 48, 6, 10


def problem(dtype=torch.float64, *, scale=1.0, num_tokens=NUM_TOKENS, vocab=VOCAB, padded=PADDED_VOCAB, seed=0):
    """Random arguments; about a quarter of the tokens do not count, and padding rows of the heads are large."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = [randn(padded, size) * scale / size**0.5 for size in (STUDENT_HIDDEN, TEACHER_HIDDEN)]
    for head in heads:
        head[vocab:] = 1000
    return {
        "student_hidden": randn(num_tokens, STUDENT_HIDDEN).to(dtype).requires_grad_(),
        "student_head": heads[0].to(dtype).requires_grad_(),
        "teacher_hidden": randn(num_tokens, TEACHER_HIDDEN).to(dtype),
        "teacher_head": heads[1].to(dtype),
        "labels": torch.randint(vocab, (num_tokens,), generator=generator),
        "loss_mask": (torch.rand(num_tokens, generator=generator) > 0.25).float(),
        "vocab_size": vocab,
    }


def fused(args, *, chunk_tokens=5, **weights):
    return fused_linear_loss(**args, vocab_start=0, group=None, chunk_tokens=chunk_tokens,
                             weights=LossWeights(**weights))


def reference(args, **weights):
    """The sums in the order of `FusedLoss` and the gradients, from full logits in float64."""
    how = LossWeights(**weights)
    leaves = [args[name].detach().double().requires_grad_() for name in ("student_hidden", "student_head")]
    mask, vocab, tau = args["loss_mask"], args["vocab_size"], how.temperature
    student = leaves[0] @ leaves[1][:vocab].t()
    none = torch.zeros((), dtype=torch.float64)
    terms = dict.fromkeys(("kl", "reverse_kl", "js", "mse", "cosine"), none)
    teacher_ce = agreement = none
    if args["teacher_hidden"] is not None:
        teacher = args["teacher_hidden"].double() @ args["teacher_head"][:vocab].double().t()
        terms["kl"] = forward_kl(student / tau, teacher / tau, mask)
        for name, formula in (("reverse_kl", reverse_kl), ("js", jensen_shannon)):
            terms[name] = formula(student / tau, teacher / tau, mask) if getattr(how, name) else none
        for name, formula in (("mse", mean_squared_error), ("cosine", cosine_distance)):
            terms[name] = formula(student, teacher, mask) if getattr(how, name) else none
        teacher_ce = cross_entropy(teacher, args["labels"], mask)
        agreement = ((student.argmax(1) == teacher.argmax(1)) & (mask != 0)).sum().double()
    ce = cross_entropy(student, args["labels"], mask)
    loss = how.ce * ce + sum(getattr(how, name) * value * (tau**2 if name in ("kl", "reverse_kl", "js") else 1)
                             for name, value in terms.items())
    grads = torch.autograd.grad(loss, leaves)
    values = (loss, *terms.values(), ce, teacher_ce, agreement, (mask != 0).sum().double())
    return [value.detach() for value in values], grads


def without_teacher(args):
    return {**args, "teacher_hidden": None, "teacher_head": None}


def assert_equals_reference(args, *, rtol, atol, grad_rtol=None, **options):
    """Values to `rtol` and `atol`; gradients to `grad_rtol` (default `rtol`) of the largest."""
    result = fused(args, **options)
    weights = {name: value for name, value in options.items() if name != "chunk_tokens"}
    values, expected_grads = reference(args, **weights)
    result.loss.backward()
    for name, actual, expected in zip(result._fields, result, values, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for name, expected in zip(("student_hidden", "student_head"), expected_grads, strict=True):
        grad = args[name].grad
        assert grad.dtype == args[name].dtype
        tolerance = (grad_rtol or rtol) * expected.abs().max().item()
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 256])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 2.0), (0.0, 1.0)])
def test_float64_value_and_gradients(chunk_tokens, weights):
    assert_equals_reference(problem(), rtol=1e-12, atol=1e-12, chunk_tokens=chunk_tokens, kl=weights[0],
                            ce=weights[1])


LOSSES = [{"reverse_kl": 1.0}, {"js": 1.0}, {"mse": 1.0}, {"cosine": 1.0}, {"temperature": 0.5}, {"temperature": 3.0},
          {"reverse_kl": 1.0, "temperature": 3.0}, {"js": 2.0, "ce": 0.5, "temperature": 0.5},
          {"kl": 0.3, "reverse_kl": 0.4, "js": 0.5, "mse": 0.6, "cosine": 0.7, "ce": 0.8, "temperature": 2.0}]


@pytest.mark.parametrize("weights", LOSSES, ids=str)
@pytest.mark.parametrize("chunk_tokens", [5, 256])
def test_every_loss_in_float64(weights, chunk_tokens):
    assert_equals_reference(problem(), rtol=1e-12, atol=1e-12, chunk_tokens=chunk_tokens, **({"kl": 0.0} | weights))


@pytest.mark.parametrize("weights", LOSSES, ids=str)
def test_every_loss_in_float32(weights):
    args = problem(torch.float32, scale=2, num_tokens=60, vocab=500, padded=512)
    assert_equals_reference(args, rtol=2e-6, atol=1e-6, grad_rtol=2e-5, chunk_tokens=32, **({"kl": 0.0} | weights))


@pytest.mark.parametrize("weights", LOSSES, ids=str)
def test_every_loss_ignores_what_does_not_count(weights):
    args = problem()
    ignored = args["loss_mask"] == 0
    with torch.no_grad():
        args["student_hidden"][ignored] = args["teacher_hidden"][ignored] = float("nan")
    result = fused(args, **weights)
    result.loss.backward()
    assert all(value.isfinite() for value in result)
    assert args["student_head"].grad.isfinite().all() and (args["student_hidden"].grad[ignored] == 0).all()


@pytest.mark.parametrize("name", ["reverse_kl", "js"])
def test_small_divergences_in_float32_are_accurate_to_a_percent(name):
    args = close_teacher(problem(torch.float32, vocab=4096, padded=4096), 3e-3)
    values, grads = reference(args, kl=0.0, **{name: 1.0})
    assert 3e-7 < values[0] / values[-1] < 5e-6
    result = fused(args, kl=0.0, **{name: 1.0})
    result.loss.backward()
    assert result.loss.item() == pytest.approx(values[0].item(), rel=1e-2)
    torch.testing.assert_close(args["student_hidden"].grad.double(), grads[0], rtol=0,
                               atol=1e-2 * grads[0].abs().max().item())


def test_divergences_of_models_that_share_no_token_are_finite():
    args = problem(torch.float32, scale=300)
    result = fused(args, reverse_kl=1.0, js=1.0)
    result.loss.backward()
    assert result.js / result.num_tokens == pytest.approx(0.693, abs=0.1)
    assert args["student_hidden"].grad.isfinite().all() and args["student_head"].grad.isfinite().all()


@pytest.mark.parametrize("chunk_tokens", [4, 64])
def test_cross_entropy_without_a_teacher(chunk_tokens):
    args = without_teacher(problem())
    assert_equals_reference(args, rtol=1e-12, atol=1e-12, chunk_tokens=chunk_tokens, ce=0.7)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_float32_is_accurate_to_1e_6(seed):
    args = problem(torch.float32, scale=2, num_tokens=100, vocab=1000, padded=1024, seed=seed)
    assert reference(args)[0][1] / 100 > 1e-2
    assert_equals_reference(args, rtol=1e-6, atol=0, grad_rtol=5e-6, ce=1.0, chunk_tokens=32)


def close_teacher(args, distance):
    """The student's own head and hidden states, the latter moved by `distance`."""
    hidden = args["student_hidden"].detach()
    moved = hidden + distance * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    return {**args, "teacher_hidden": moved, "teacher_head": args["student_head"].detach()}


@pytest.mark.parametrize(("distance", "scale"), [(1.6e-3, 1.0), (5e-4, 4.0)])
def test_small_kl_in_float32_is_accurate_to_a_percent(distance, scale):
    args = close_teacher(problem(torch.float32, vocab=4096, padded=4096, scale=scale), distance)
    values, grads = reference(args)
    assert 5e-7 < values[1] / values[-1] < 2e-6
    result = fused(args)
    result.loss.backward()
    assert result.kl.item() == pytest.approx(values[1].item(), rel=1e-2)
    torch.testing.assert_close(args["student_hidden"].grad.double(), grads[0], rtol=0,
                               atol=1e-2 * grads[0].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_student_equal_to_teacher(dtype):
    args = close_teacher(problem(dtype), 0.0)
    result = fused(args)
    result.loss.backward()
    assert result.kl == 0
    assert result.agreement == result.num_tokens
    assert result.ce == result.teacher_ce
    assert args["student_hidden"].grad.abs().max() == 0
    assert args["student_head"].grad.abs().max() == 0


@pytest.mark.parametrize("distance", [1e-8, 1e-7, 1e-6, 1e-5])
def test_kl_is_never_negative(distance):
    assert fused(close_teacher(problem(torch.float32, scale=8), distance)).kl >= 0


def test_log_ratios_beyond_the_range_of_exp():
    args = problem(torch.float32, scale=300)
    values, _ = reference(args, ce=1.0)
    assert values[1] / values[-1] > 100
    assert_equals_reference(args, rtol=2e-6, atol=0, ce=1.0)


def test_rows_that_do_not_count_may_hold_anything():
    clean, dirty = problem(), problem()
    ignored = dirty["loss_mask"] == 0
    assert 0 < ignored.sum() < NUM_TOKENS
    with torch.no_grad():
        for name, value in (("student_hidden", float("nan")), ("teacher_hidden", float("inf")), ("labels", -100)):
            dirty[name][ignored] = value
    results = []
    for args in (clean, dirty):
        results.append(fused(args, ce=1.0))
        results[-1].loss.backward()
    assert results[0] == results[1]
    assert torch.equal(clean["student_hidden"].grad, dirty["student_hidden"].grad)
    assert torch.equal(clean["student_head"].grad, dirty["student_head"].grad)
    assert (dirty["student_hidden"].grad[ignored] == 0).all()


@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_valid_token_gives_zero(with_teacher):
    args = problem()
    args["loss_mask"].zero_()
    with torch.no_grad():
        args["student_hidden"].fill_(float("nan"))
    result = fused(args if with_teacher else without_teacher(args), ce=1.0)
    result.loss.backward()
    assert [value.item() for value in result] == [0] * 10
    assert (args["student_hidden"].grad == 0).all()
    assert (args["student_head"].grad == 0).all()


def test_padding_rows_get_no_gradient():
    args = problem()
    fused(args, ce=1.0).loss.backward()
    assert (args["student_head"].grad[VOCAB:] == 0).all()
    assert (args["student_head"].grad[:VOCAB] != 0).all()


def test_a_label_outside_the_vocabulary_is_not_silent():
    args = problem()
    args["labels"][args["loss_mask"].argmax()] = VOCAB
    assert fused(args).ce == float("inf")
    assert fused(args).loss.isfinite()
    assert fused(args, ce=1.0).loss == float("inf")


def test_agreement_takes_the_lowest_of_equal_maxima():
    args = problem()
    args["loss_mask"].fill_(1)
    with torch.no_grad():
        for name in ("student_head", "teacher_head"):
            args[name].zero_()
        args["student_head"][:2] = args["student_head"][30] = 1
        args["student_hidden"].fill_(1)  # ids 0, 1 and 30 tie
        args["teacher_head"][1], args["teacher_head"][0] = 1, 2
        args["teacher_hidden"].fill_(1)  # id 0
        args["teacher_hidden"][:4] = -1  # ids 2 and more tie
    assert fused(args).agreement == NUM_TOKENS - 4


def test_bfloat16_inputs_are_computed_in_float32():
    narrow = problem(torch.bfloat16)
    wide = {**narrow, **{name: narrow[name].detach().float().requires_grad_(narrow[name].requires_grad)
                         for name in ("student_hidden", "student_head", "teacher_hidden", "teacher_head")}}
    results = []
    for args in (narrow, wide):
        results.append(fused(args, ce=1.0))
        results[-1].loss.backward()
    assert results[0] == results[1]
    assert results[0].loss.dtype == torch.float32
    for name in ("student_hidden", "student_head"):
        assert torch.equal(narrow[name].grad, wide[name].grad.bfloat16())


def test_autocast_does_not_narrow_the_logits():
    args = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fused(args)
    assert result == fused(args)


def test_only_the_loss_has_a_gradient_and_it_is_scaled_by_the_gradient_of_the_output():
    args, tripled = problem(), problem()
    result = fused(args)
    assert [value.requires_grad for value in result] == [True] + [False] * 9
    result.loss.backward()
    (3 * fused(tripled).loss).backward()
    torch.testing.assert_close(tripled["student_head"].grad, 3 * args["student_head"].grad)


def test_a_second_backward_raises():
    loss = fused(problem()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_without_grad_mode_the_values_are_the_same():
    args = problem()
    with torch.no_grad():
        result = fused(args, ce=1.0)
    assert not result.loss.requires_grad
    assert result == tuple(value.detach() for value in fused(args, ce=1.0))


def test_a_frozen_head_still_passes_the_gradient_of_the_hidden_states():
    args, frozen = problem(), problem()
    frozen["student_head"].requires_grad_(False)
    for each in (args, frozen):
        fused(each).loss.backward()
    assert frozen["student_head"].grad is None
    assert torch.equal(args["student_hidden"].grad, frozen["student_hidden"].grad)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_no_tensor_of_tokens_by_vocabulary_is_made():
    chunk_tokens, vocab, num_tokens = 8, 512, 256
    args = problem(torch.float32, num_tokens=num_tokens, vocab=vocab, padded=vocab)
    with LargestTensor() as recorder:
        fused(args, chunk_tokens=chunk_tokens, ce=1.0).loss.backward()
    assert vocab * chunk_tokens <= recorder.largest <= 3 * vocab * chunk_tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_gemms_on_cuda():
    args = {name: value.detach().cuda() if isinstance(value, torch.Tensor) else value
            for name, value in problem(torch.bfloat16, num_tokens=64, vocab=1000, padded=1024).items()}
    for name in ("student_hidden", "student_head"):
        args[name].requires_grad_()
    values, grads = reference(args, ce=1.0)
    result = fused(args, ce=1.0, chunk_tokens=24)
    result.loss.backward()
    torch.testing.assert_close(result.loss.double(), values[0], rtol=1e-5, atol=0)
    for name, expected in zip(("student_hidden", "student_head"), grads, strict=True):
        torch.testing.assert_close(args[name].grad.double(), expected, rtol=0, atol=1e-2 * expected.abs().max().item())
