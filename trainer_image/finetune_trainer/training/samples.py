"""Lets the model answer fixed prompts while it trains, for people to read.

The answers go to a file that every checkpoint carries. They are never logged: prompts may be rows of the data.
Sampling leaves no trace in the training: gradients, random generators, mode and weights stay as they are.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_api.failures import FailureReason
from finetune_api.spec.training import SamplesSpec
from finetune_api.vocabulary import TrainOn
from finetune_kernels.layers.supervised_loss import causal_model
from finetune_kernels.streaming.layer_window import LayerWindow
from finetune_trainer.chat.encoder import ChatEncoder
from finetune_trainer.chat.labels import IGNORED
from finetune_trainer.data.messages import BadRowError
from finetune_trainer.distributed.passes_together import passes_together
from finetune_trainer.distributed.world import ALONE, ANOTHER_RANK, World
from finetune_trainer.errors import InterruptedRunError, TrainerError
from finetune_trainer.stopping import raise_if_requested, request_stop
from finetune_trainer.training.losses import takes_positions
from finetune_trainer.training.records import SampleLine, read_samples, write_samples

log = logging.getLogger(__name__)
MAX_PROMPT_ROWS = 4
"""Rows of the evaluation data that prompts are taken from, if the job names none."""
MAX_BEGINNING = 32
"""Tokens of the prompt that is cut from a row without a prompt of its own."""
PROMPTS_PER_BATCH = 8


@dataclass(frozen=True)
class Prompt:
    """One prompt, and the answer to compare with."""

    text: str
    """The prompt for people, without special tokens."""
    input_ids: list[int]
    reference: str | None = None
    """The dataset's own answer to this prompt, if the prompt is from the dataset."""


def build_prompts(
    spec: SamplesSpec, tokenizer: Any, evaluation: Any | None, max_length: int, embedding_rows: int | None = None
) -> tuple[Prompt, ...]:
    """Returns the job's prompts, or the beginnings of the first rows of `evaluation` if the job names none.

    Raises TrainerError (InvalidConfiguration) for a prompt of more than `max_length` tokens.
    """
    if not spec.prompts:
        assert evaluation is not None
        # The API refuses a job that has neither prompts nor evaluation data.
        rows = evaluation[: min(MAX_PROMPT_ROWS, len(evaluation))]
        pairs = zip(rows["input_ids"], rows["labels"], strict=True)
        return tuple(_split_row(ids, labels, tokenizer) for ids, labels in pairs)

    encoder = ChatEncoder(tokenizer, TrainOn.RESPONSES, embedding_rows=embedding_rows)
    prompts = tuple(_encode_prompt(encoder, text, index) for index, text in enumerate(spec.prompts))

    for index, prompt in enumerate(prompts):
        if len(prompt.input_ids) > max_length:
            found = f"has {len(prompt.input_ids)} tokens, more than maxSequenceLength = {max_length}"
            message = f"spec.training.samples.prompts[{index}] {found}: shorten it"
            raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
    return prompts


class Sampler:
    """Takes samples, at most once a step, and writes them to a file below `folder`.

    The ranks of a run share the prompts: rank r of N answers every N-th, from the r-th on. Chance belongs to a prompt,
    so the answers are the same for any number of ranks. Rank 0 writes them.
    """

    def __init__(
        self,
        prompts: tuple[Prompt, ...],
        spec: SamplesSpec,
        tokenizer: Any,
        seed: int,
        folder: Path,
        window: LayerWindow | None = None,
    ) -> None:
        """`window`: the layers' weights, if the ranks share them out."""
        self._folder, self._window = folder, window
        self._prompts, self._spec, self._tokenizer, self._seed = prompts, spec, tokenizer, seed
        self._sampled: set[int] = set()

    def take(self, model: Any, step: int, world: World = ALONE) -> None:
        """Lets `model`, a peft model after `step` steps, answer every prompt. On all ranks of `world`.

        Raises InterruptedRunError if a rank is asked to stop; no sample of the step is written then.
        """
        if self.has(step):
            return

        began, stopped = time.monotonic(), None
        own: list[list[int]] | None = None
        try:
            with passes_together(self._window, world):
                own = self._answer(model, range(world.rank, len(self._prompts), world.size))
        except torch.OutOfMemoryError:
            log.warning("no samples of step %d: the answers do not fit the GPU's memory", step)
        except InterruptedRunError as error:
            stopped = error

        # A rank that has no answers still meets the others, who learn of it here.
        shares = world.gather_objects((own, stopped is not None))
        if any(stops for _, stops in shares):
            request_stop(ANOTHER_RANK)
            raise stopped or InterruptedRunError(f"stopped by {ANOTHER_RANK}")
        if any(share is None for share, _ in shares):
            return

        self._sampled.add(step)
        if world.rank > 0:
            return
        answers = {
            place: ids for rank, (share, _) in enumerate(shares) for place, ids in self._placed(share, rank, world)
        }
        lines = [self._line(step, prompt, answers[place]) for place, prompt in enumerate(self._prompts)]
        write_samples(self._folder, lines, append=True)
        log.info("%d samples of step %d took %.1f s", len(lines), step, time.monotonic() - began)

    def _placed(self, share: list[list[int]] | None, rank: int, world: World) -> Iterator[tuple[int, list[int]]]:
        """Yields a rank's answers with the places of their prompts."""
        return zip(range(rank, len(self._prompts), world.size), share or (), strict=True)

    def _answer(self, model: Any, places: range) -> list[list[int]]:
        """Token ids of the answers to the prompts at some places, in batches."""
        answers: list[list[int]] = []
        with sampling_mode(model, self._seed):
            for first in range(0, len(places), PROMPTS_PER_BATCH):
                answers += self._generate(model, places[first : first + PROMPTS_PER_BATCH])
        return answers

    def has(self, step: int) -> bool:
        """True if the samples of a step have been taken."""
        return step in self._sampled

    def lines(self) -> tuple[SampleLine, ...]:
        """All samples so far, in order."""
        return read_samples(self._folder)

    def save_into(self, checkpoint: Path) -> None:
        """Adds the samples so far to a checkpoint's folder."""
        write_samples(checkpoint, self.lines())

    def restore_from(self, checkpoint: Path) -> None:
        """Takes over the samples of a checkpoint."""
        lines = read_samples(checkpoint)
        write_samples(self._folder, lines)
        self._sampled = {line.step for line in lines}

    def _generate(self, model: Any, places: range) -> list[list[int]]:
        """Token ids of the answers to the prompts of one batch."""
        prompts = [self._prompts[place].input_ids for place in places]
        ends = end_tokens(causal_model(model), self._tokenizer)
        device = next(weights.device for weights in model.parameters() if weights.requires_grad)
        length = max(map(len, prompts))
        pad = ends[0] if ends else 0  # masked, so any token will do

        # [B, T], padded on the left: every prompt ends where its answer begins.
        ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)

        columns = []
        choose = choose_by(
            self._spec.temperature, [torch.Generator(device).manual_seed(self._seed + place) for place in places]
        )
        for tokens in generate_tokens(model, ids, mask, ends, self._spec.max_tokens, choose):
            raise_if_requested()
            columns.append(tokens)
        return [_until_end(row, ends) for row in torch.stack(columns, dim=1).tolist()]

    def _line(self, step: int, prompt: Prompt, ids: list[int]) -> SampleLine:
        return SampleLine(
            step=step,
            prompt=prompt.text,
            answer=str(self._tokenizer.decode(ids, skip_special_tokens=True)),
            tokens=len(ids),
            finished=len(ids) < self._spec.max_tokens,
            reference=prompt.reference,
        )


Choice = Callable[[torch.Tensor], torch.Tensor]
"""Chooses a token for every row, [B], from its logits, [B, V]."""


def choose_by(temperature: float, generators: Sequence[torch.Generator | None]) -> Choice:
    """Returns the choice of a temperature, by chance from each row's generator; None is the default one. 0 chooses the
    likeliest token."""

    def draw(logits: torch.Tensor) -> torch.Tensor:
        if not temperature:
            return logits.argmax(-1)
        shares = (logits / temperature).softmax(-1)  # [B, V]
        drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(shares, generators, strict=True)]
        return torch.cat(drawn)

    return draw


def generate_tokens(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, ends: Sequence[int], max_tokens: int, choose: Choice
) -> Iterator[torch.Tensor]:
    """Yields the next token of every row, [B], until every row has had one of `ends`, at most `max_tokens` times.

    `ids` and `mask` are [B, T]; the mask is 0 at padding. Written out because transformers' `generate` moves tokens to
    the embedding's device, which may be host memory.
    """
    causal = causal_model(model)
    options: dict[str, Any] = {"logits_to_keep": 1} if takes_positions(model) else {}
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [B, T]; 0 at the first token that is not padding
    ending = torch.tensor(list(ends), device=ids.device)
    ended, cache = torch.zeros(len(ids), dtype=torch.bool, device=ids.device), None

    for _ in range(max_tokens):
        # As in training: where the residual stream is fp32, products are not.
        with torch.autocast(ids.device.type, torch.float16, enabled=causal.dtype is torch.float16):
            output = causal(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                **options,
            )  # fmt: skip
        tokens = choose(output.logits[:, -1].float())
        yield tokens

        ended |= torch.isin(tokens, ending)
        if bool(ended.all()):
            return

        # From the second pass on the cache holds everything but the newest token: ids is [B, 1].
        ids, cache, positions = tokens.unsqueeze(1), output.past_key_values, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)


@contextmanager
def sampling_mode(model: Any, seed: int) -> Iterator[None]:
    """Evaluation mode without gradients, with random numbers from `seed`; restores mode and generators at the end."""
    was_training = model.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()

    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)


def end_tokens(causal: Any, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's, and those of the model's generation config."""
    # One id, a list of ids, or None.
    listed = causal.generation_config.eos_token_id
    ends = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)


def _encode_prompt(encoder: ChatEncoder, text: str, index: int) -> Prompt:
    try:
        return Prompt(text, encoder.encode_question(text))
    except BadRowError as error:
        message = f"spec.training.samples.prompts[{index}] cannot be used: {error}"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message) from None


def _split_row(ids: list[int], labels: list[int], tokenizer: Any) -> Prompt:
    """Splits a row into prompt and answer: at its first answer, or after its beginning if all of it is trained on."""
    answers = [index for index, label in enumerate(labels) if label != IGNORED]
    first, end = answers[0], len(ids)
    if first == 0:
        first = min(MAX_BEGINNING, len(ids) // 2)
    else:
        end = next((index for index in range(first, len(ids)) if labels[index] == IGNORED), len(ids))
    texts = [str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:first], ids[first:end])]
    return Prompt(texts[0], list(ids[:first]), texts[1])


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    """The tokens before the first of `ends`."""
    return next((row[:index] for index, token in enumerate(row) if token in ends), row)
