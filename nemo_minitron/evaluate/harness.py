"""lm-evaluation-harness's interface to a model, answered by the live sharded one; rank 0 only. Imports lm_eval.

Texts become tokens exactly as in lm_eval's own `hf` model, so that the same checkpoint gets the same scores there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemo_minitron.errors import DataError
from nemo_minitron.evaluate.choices import Option
from nemo_minitron.evaluate.live import LiveModel
from nemo_minitron.generate.sampling import Sampling
from nemo_minitron.generate.stopping import StopAt

KEY = "evaluate.tasks"
MAX_GENERATED = 256
"""New tokens where a task does not say; lm_eval's own default."""


class HarnessModel(TemplateLM):
    """Requests of lm_eval, put to all ranks; used inside `live.directing()`."""

    def __init__(self, live: LiveModel, *, add_bos: bool | None = None, seed: int = 1234) -> None:
        """`add_bos`: as `evaluate.add_bos`; `seed`: of sampled continuations."""
        super().__init__()
        self.live, self.add_bos, self.seed = live, add_bos, seed
        self.tokenizer = live.tokenizer
        if self.prefix_token_id is None:
            raise DataError("a tokenizer without bos and eos", expected="a token that documents begin or end with",
                            found="none", key="teacher.path")

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is conditioned on where there is no context: bos, else eos."""
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.tokenizer.eos_token_id

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return self.live.max_length

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm_eval's request cache, which is not used here."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; a bos where asked for, or where the tokenizer adds one, unless the text begins with it."""
        special = self.add_bos if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = False
        if special is None:
            return self.tokenizer.encode(string, verbose=False)
        tokens = self.tokenizer.encode(string, add_special_tokens=special, verbose=False)
        # the demo's tokenizer and its like have a bos that no template of theirs adds
        return tokens if not special or tokens[:1] == [self.prefix_token_id] else [self.prefix_token_id, *tokens]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text, by the tokenizer's template."""
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False,
                                                  add_generation_prompt=add_generation_prompt,
                                                  continue_final_message=not add_generation_prompt)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
                              **_: Any) -> list[tuple[float, bool]]:
        options = []
        for texts, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise DataError("a task's question cannot be put to the model", key=KEY,
                                expected=f"a continuation of 1 to {self.max_length} tokens",
                                found=f"{len(continuation)} tokens in {str(texts)[-60:]}")
            options.append(Option(tuple((context + continuation)[-(self.max_length + 1):]), len(continuation)))
        return self.live.ask_scores(options) if options else []

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, nats; long ones in windows that each predict new tokens only."""
        windows: list[tuple[int, tuple[Any, list[int], list[int]]]] = []
        for number, request in enumerate(requests):
            parts = get_rolling_token_windows(token_list=self.tok_encode(request.args[0]), context_len=1,
                                              prefix_token=self.prefix_token_id, max_seq_len=self.max_length)
            windows += [(number, (None, *make_disjoint_window(part))) for part in parts]
        totals = [0.0] * len(requests)
        for (number, _), (log_prob, _) in zip(windows, self._loglikelihood_tokens([window for _, window in windows]),
                                              strict=True):
            totals[number] += log_prob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to its stop strings."""
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(number)
        for numbers in alike.values():
            made = self._generate([requests[number].args[0] for number in numbers], dict(requests[numbers[0]].args[1]))
            for number, text in zip(numbers, made, strict=True):
                texts[number] = text
        return texts

    def _generate(self, contexts: list[str], asked: dict[str, Any]) -> list[str]:
        how = dict(normalize_gen_kwargs(asked, MAX_GENERATED))
        room = self.max_length - how["max_gen_toks"]
        if room < 1:
            raise DataError("a task wants longer answers than the model has positions for", key=KEY,
                            expected=f"fewer than {self.max_length} tokens", found=str(how["max_gen_toks"]))
        until = handle_stop_sequences(how["until"], eos=self.tokenizer.decode(self.eot_token_id))
        sampling = Sampling(max_new_tokens=how["max_gen_toks"], seed=self.seed, top_p=float(how.get("top_p", 1.0)),
                            temperature=float(how.get("temperature", 0.0)) if how["do_sample"] else 0.0)
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        stop = StopAt(self.tokenizer, until)
        return [stop.cut(tokens) for tokens in self.live.ask_continuations(prompts, sampling, until)]
