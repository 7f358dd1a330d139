"""Inputs of a job: the base model and the dataset."""

from typing import Annotated

from pydantic import AfterValidator, Field

from finetune_api.base import MAX_COUNT, ApiModel, Pattern, ResourceName, Rule
from finetune_api.spec.sources import Scheme, Source, SourceUri, stays_inside
from finetune_api.vocabulary import ChatTemplateName, DatasetFormat, OnBadRow, Quantization, TrainOn

ColumnName = Annotated[str, Field(min_length=1, max_length=128)]
SplitName = Annotated[
    str,
    Field(max_length=128),
    Pattern(r"^[A-Za-z0-9._-]+$", "write the split's name, such as train: letters, digits, '.', '_' and '-'"),
]
NewToken = Annotated[
    str,
    Field(min_length=1, max_length=128),
    Pattern(r"^\S([^\r\n]*\S)?$", "write a token of one line, without spaces at its ends"),
]
MAX_NEW_TOKENS = 512


def _each_once(tokens: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(tokens)) < len(tokens):
        raise ValueError("write each new token once")
    return tokens


NewTokens = Annotated[
    tuple[NewToken, ...],
    Field(max_length=MAX_NEW_TOKENS, json_schema_extra={"x-kubernetes-list-type": "set"}),
    AfterValidator(_each_once),
]
"""A set: the API server refuses a token that is written twice. A rule in CEL would cost more than a schema may."""


class SecretReference(ApiModel):
    """A Secret in the job's namespace, mounted into the trainer's pod. The operator never reads it."""

    secret_name: ResourceName
    """Name of a Secret. For s3:// it holds AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN if
    needed); for hf:// and for the Hub it holds HF_TOKEN."""


def _source_rules(field: str) -> tuple[Rule, ...]:
    return (
        Rule(
            cel="!self.source.split('/').exists(segment, segment == '..')",
            holds=lambda spec: stays_inside(spec.source),
            message=f"{field}.source must not contain '..': write the path without it",
        ),
    )


class ModelSpec(ApiModel):
    """The base model, and the way it is loaded."""

    source: SourceUri
    """Source of the base model: hf://org/name, s3://bucket/prefix/, or pvc://claim/path (file:///path with `finetune
    run`). It must be a folder in Hugging Face layout with safetensors weights; pickled weights and custom code are
    refused. Of a checkpoint that also reads images or sound, the language model trains on text, and everything else is
    copied into merged weights unchanged. FP8 and MXFP4 weights are decoded; merged weights have 16 bits."""

    revision: (
        Annotated[
            str,
            Field(max_length=255),
            Pattern(r"^[A-Za-z0-9._/-]+$", "write a branch, tag or commit: letters, digits, '.', '_', '/' and '-'"),
        ]
        | None
    ) = None
    """Branch, tag or commit of an hf:// source. It is pinned to a commit when the job starts, shown in
    status.resolved. Default: the main branch."""

    max_sequence_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Maximum length of a training example in tokens; longer rows are truncated at the end. Default 2048. Memory grows
    in proportion."""

    quantization: Quantization = Quantization.NF4
    """Storage type of the frozen base weights during training: NF4 (4-bit NormalFloat, about a quarter of the memory)
    or None (16-bit). Default NF4."""

    double_quantization: bool = True
    """Quantise the scales of NF4 blocks as well, which saves 0.4 bits per weight. Default true."""

    chat_template: Annotated[str, Field(min_length=1, max_length=65_536)] | None = None
    """Jinja chat template that replaces the tokenizer's own; {% generation %} and {% endgeneration %} around answers
    mark exactly the text that carries loss. Default: the tokenizer's template."""

    chat_template_name: ChatTemplateName | None = None
    """Chat template of a known family that replaces the tokenizer's own: Alpaca, ChatML, Gemma, Llama3, Mistral, Phi3,
    Phi4, Qwen (ChatML with tools), Vicuna or Zephyr. The tokenizer must have the family's special tokens (Alpaca,
    Vicuna and Zephyr need none). Default: the tokenizer's template."""

    new_tokens: NewTokens = ()
    """Tokens that are added to the vocabulary, such as "<|im_start|>" or a word of your field. Their rows of embedding
    and head train beside the adapter, from the mean of the pieces that the text had before; no other row changes. They
    are in the merged weights, in GGUF files, and in the adapter as PEFT's trainable_token_indices. Default: none."""

    credentials: SecretReference | None = None
    """Secret that may read the source. Default: anonymous access, or the identity of the pod."""

    rules = (
        *_source_rules("spec.model"),
        Rule(
            cel="!has(self.revision) || self.source.startsWith('hf://')",
            holds=lambda spec: spec.revision is None or spec.source.startswith("hf://"),
            message="spec.model.revision only goes with an hf:// source: remove it, or put the version into the path",
        ),
        Rule(
            cel="!(has(self.chatTemplate) && has(self.chatTemplateName))",
            holds=lambda spec: spec.chat_template is None or spec.chat_template_name is None,
            message="spec.model.chatTemplate and spec.model.chatTemplateName exclude each other: write one of them",
        ),
    )

    def has_own_template(self) -> bool:
        """True if the job chooses the chat template, in place of the tokenizer's."""
        return self.chat_template is not None or self.chat_template_name is not None


class DatasetColumns(ApiModel):
    """Names of the dataset's columns, where they differ from the usual ones."""

    messages: ColumnName = "messages"
    """Column with the list of {role, content} of format Messages. Default messages."""

    prompt: ColumnName = "prompt"
    """Column with the prompt of format PromptCompletion. Default prompt."""

    completion: ColumnName = "completion"
    """Column with the completion of format PromptCompletion. Default completion."""

    conversations: ColumnName = "conversations"
    """Column with the list of {from, value} of format ShareGPT. Default conversations."""

    instruction: ColumnName = "instruction"
    """Column with the instruction of format Alpaca. Default instruction."""

    input: ColumnName = "input"
    """Column with the input that the instruction of format Alpaca refers to; rows may leave it out. Default input."""

    output: ColumnName = "output"
    """Column with the answer of format Alpaca. Default output."""

    system: ColumnName = "system"
    """Column with the system message of formats ShareGPT, PromptCompletion and Alpaca; rows may leave it out. Default
    system."""

    tools: ColumnName = "tools"
    """Column with the tools of formats Messages and ShareGPT, as a list or as JSON text; rows may leave it out. Default
    tools."""

    text: ColumnName = "text"
    """Column with the text of format Text. Default text."""


class EvaluationSpec(ApiModel):
    """Evaluation data: a share of the training rows, another split, or a source of its own."""

    fraction: Annotated[float, Field(gt=0, le=0.5)] | None = None
    """Share of the rows to hold out, chosen by the job's seed; at least one row. 0.05 holds out one row in
    twenty. Default: none; leave it out if split or source is set."""

    split: SplitName | None = None
    """Split of an hf:// dataset to evaluate on, such as validation: of spec.dataset.source, or of source if that is
    set. Its rows are never trained on. Default: spec.dataset.split of source."""

    source: SourceUri | None = None
    """Source of evaluation data with the same layout as spec.dataset.source, of the same kind (hf://, s3:// or the same
    claim) and read with the same credentials. Default: spec.dataset.source."""

    rules = (
        Rule(
            cel="has(self.fraction) != (has(self.split) || has(self.source))",
            holds=lambda spec: (spec.fraction is not None) != (spec.split is not None or spec.source is not None),
            message="spec.dataset.evaluation takes fraction, or else split or source: write one of them",
        ),
        Rule(
            cel="!has(self.source) || !self.source.split('/').exists(segment, segment == '..')",
            holds=lambda spec: spec.source is None or stays_inside(spec.source),
            message="spec.dataset.evaluation.source must not contain '..': write the path without it",
        ),
    )


class DatasetSpec(ApiModel):
    """The training data, and the way rows become tokens."""

    source: SourceUri
    """Source of the data: s3://bucket/file.jsonl, hf://org/name, or pvc://claim/file.jsonl (file:///path with
    `finetune run`), or a prefix that ends in '/' with several files. JSON Lines, JSON, CSV, TSV (each also .gz or
    .zst), Parquet or Arrow."""

    split: SplitName = "train"
    """Split of an hf:// dataset. Default train. Other sources have no splits."""

    subset: SplitName | None = None
    """Subset of an hf:// dataset (a configuration that its card names, or a folder). Default: the card's default
    subset, or all files where the card names none."""

    format: DatasetFormat = DatasetFormat.AUTO
    """Layout of a row: Messages ({messages: [{role, content}]}, as for OpenAI), ShareGPT ({conversations: [{from,
    value}]}), PromptCompletion ({prompt, completion}), Alpaca ({instruction, input, output}), Text ({text}), or Auto,
    which detects it from the columns. Default Auto; status.resolved shows the detected layout."""

    columns: DatasetColumns = DatasetColumns()
    """Names of the dataset's columns, where they differ from the usual ones."""

    train_on: TrainOn = TrainOn.RESPONSES
    """Tokens that carry loss: Responses (assistant turns or completions) or All. Text rows always train on all
    tokens. A message of the assistant with weight: 0, loss: false or train: false is read, but carries no loss.
    Default Responses."""

    packing: bool = True
    """Pack several short rows into one sequence; each row attends only to itself. Default true."""

    max_samples: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """Maximum number of rows to use, from the start of the data. Default: all rows."""

    on_bad_row: OnBadRow = OnBadRow.FAIL
    """Effect of an unusable row: Fail ends the job and names the lines; Skip leaves such rows out and counts them in
    status.resolved. Default Fail."""

    evaluation: EvaluationSpec | None = None
    """Evaluation during training, on rows that are not trained on. Default: no evaluation."""

    credentials: SecretReference | None = None
    """Secret that may read the source. Default: anonymous access, or the identity of the pod."""

    rules = (
        *_source_rules("spec.dataset"),
        Rule(
            cel="!has(self.subset) || self.source.startsWith('hf://')",
            holds=lambda spec: spec.subset is None or spec.source.startswith("hf://"),
            message="spec.dataset.subset only goes with an hf:// source: remove it, or put the folder into the path",
        ),
        Rule(
            cel="!has(self.evaluation) || !has(self.evaluation.source) "
            "|| (self.evaluation.source.split('/')[0] == self.source.split('/')[0] "
            "&& (!self.source.startsWith('pvc://') "
            "|| self.evaluation.source.split('/')[2] == self.source.split('/')[2]))",
            holds=lambda spec: spec.evaluation is None or _is_read_alike(spec.evaluation.source, spec.source),
            message="spec.dataset.evaluation.source must be read as spec.dataset.source is: put both into hf://, s3:// "
            "or one claim",
        ),
        Rule(
            cel="!has(self.evaluation) || !has(self.evaluation.split) || (self.source.startsWith('hf://') "
            "&& (has(self.evaluation.source) || self.evaluation.split != self.split))",
            holds=lambda spec: spec.evaluation is None or _has_other_split(spec),
            message="spec.dataset.evaluation.split must name another split of an hf:// dataset than "
            "spec.dataset.split: write such as validation, or use fraction or source",
        ),
    )

    def evaluation_source(self) -> tuple[str, str] | None:
        """URI and split of the data that are evaluated on; None where they are held out, or there are none."""
        if self.evaluation is None or self.evaluation.fraction is not None:
            return None
        return self.evaluation.source or self.source, self.evaluation.split or self.split

    def evaluation_subset(self) -> str | None:
        """Subset of the data that are evaluated on: the same, where they come from the same source."""
        other = self.evaluation.source if self.evaluation is not None else None
        return self.subset if other in (None, self.source) else None


def _is_read_alike(uri: str | None, other: str) -> bool:
    """Return True if the same credentials and the same mount reach both URIs."""
    if uri is None:
        return True
    first, second = Source.parse(uri), Source.parse(other)
    return first.scheme is second.scheme and (first.scheme is not Scheme.PVC or first.location == second.location)


def _has_other_split(spec: DatasetSpec) -> bool:
    assert spec.evaluation is not None
    if spec.evaluation.split is None:
        return True
    is_hub = spec.source.startswith("hf://")
    return is_hub and (spec.evaluation.source is not None or spec.evaluation.split != spec.split)
