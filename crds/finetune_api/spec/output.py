"""Outputs of a job: artifacts and their destinations."""

from typing import Annotated

from pydantic import Field

from finetune_api.base import SUBDOMAIN, ApiModel, Pattern, Rule
from finetune_api.spec.inputs import SecretReference
from finetune_api.vocabulary import GgufType, MergedType, OnExisting

EndpointUrl = Annotated[
    str,
    Field(max_length=512),
    Pattern(
        r"^https?://[A-Za-z0-9.:\[\]_-]+(/[A-Za-z0-9._~/-]*)?$",
        "write an address such as https://minio.example.com:9000",
    ),
]
BucketName = Annotated[
    str,
    Field(min_length=3, max_length=63),
    Pattern(rf"^{SUBDOMAIN}$", "write the bucket's name alone: lower-case letters, digits, single dots and hyphens"),
]
Prefix = Annotated[
    str,
    Field(max_length=512),
    Pattern(r"^[A-Za-z0-9!_.*'()/-]*$", "write a folder's name of letters, digits and ! _ . * ' ( ) / -"),
]
Region = Annotated[
    str, Field(max_length=64), Pattern(r"^[a-z0-9-]+$", "write the region's short name, such as eu-central-1")
]


class ExportSpec(ApiModel):
    """Artifacts to create. The adapter is always one of them."""

    merged: MergedType = MergedType.BF16
    """Merged weights (base plus adapter) in BF16 or FP16 safetensors, or None for no merged weights. Default BF16."""

    gguf: Annotated[tuple[GgufType, ...], Field(max_length=len(GgufType))] = (GgufType.Q8_0,)
    """GGUF files for llama.cpp and Ollama, one for each type listed. F32, F16 and BF16 keep the weights as they are;
    Q8_0 (8.5 bits per weight) and Q6_K (6.6) lose almost nothing; Q5_K_M (5.7) and Q4_K_M (4.9) are the usual
    choices for small memory; IQ4_NL (4.5) and IQ4_XS (4.3) are close to Q4_K_S and smaller; MXFP4_MOE is gpt-oss's
    own type: experts in 4.25 bits, everything else in Q8_0. Use Q3_K_L, _M, _S and Q2_K (4.3 to 3.0) only if nothing
    larger fits. Q5_K_S and Q4_K_S are a little smaller than _M; Q4_0, Q4_1, Q5_0 and Q5_1 are older types for
    programs without K-quants. Default [Q8_0]; [] creates none."""

    rules = (
        Rule(
            cel="self.gguf.all(type, self.gguf.exists_one(other, other == type))",
            holds=lambda spec: len(set(spec.gguf)) == len(spec.gguf),
            message="spec.export.gguf lists a type twice: name each type once",
        ),
    )


class S3Output(ApiModel):
    """A bucket in S3 or in any store with an S3 API."""

    bucket: BucketName | None = None
    """Bucket for artifacts and checkpoints. It must exist. Required on a cluster; `finetune run --output DIR` goes
    without."""

    prefix: Prefix = ""
    """Folder inside the bucket; the job writes to <prefix>/<namespace>/<name>/, unless the operator is set up for
    another layout below the prefix: status.resultLocation says where. Default: none, the layout begins at the top."""

    region: Region | None = None
    """Region of the bucket. Default: the region of the pod's identity, else us-east-1."""

    endpoint_url: EndpointUrl | None = Field(None, alias="endpointURL")
    """Address of a store other than AWS, such as https://minio.example.com. s3:// sources of the model and the dataset
    are read from it too. Default: AWS."""

    credentials: SecretReference | None = None
    """Secret that may write to the bucket. Default: the identity of the pod."""

    on_existing: OnExisting = OnExisting.REUSE
    """Effect of a finished result in the same place: Reuse takes it if it was made from the same specification (and
    fails otherwise), Fail fails, Overwrite replaces it. Default Reuse, so that a re-created job does not train
    again."""

    rules = (
        Rule(
            cel="!self.prefix.startsWith('/') && !self.prefix.contains('//') && "
            "!self.prefix.split('/').exists(part, part == '..' || part == '.')",
            holds=lambda spec: (
                not {"..", "."} & set(spec.prefix.split("/"))
                and not spec.prefix.startswith("/")
                and "//" not in spec.prefix
            ),
            message="spec.output.s3.prefix must be a plain relative path: "
            "write it without '.', '..', '//' and a leading '/'",
        ),
    )


class HubOutput(ApiModel):
    """A model repository of the Hugging Face Hub."""

    repository: Annotated[
        str,
        Field(max_length=96),
        Pattern(
            r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$",
            "write the repository as organisation/name: letters, digits, '.', '_' and '-'",
        ),
    ]
    """Repository to push the artifacts to, as organisation/name. It is created when the job starts if it does not
    exist."""

    private: bool = True
    """Make the repository private. Default true. An existing repository with another visibility is refused, so that
    nothing becomes public by mistake."""

    credentials: SecretReference
    """Secret with the HF_TOKEN that may write to the repository."""


class OutputSpec(ApiModel):
    """Destination of artifacts and checkpoints."""

    s3: S3Output = S3Output()
    """S3 location of artifacts and checkpoints."""

    hub: HubOutput | None = None
    """Hugging Face repository to push the artifacts to, after they are committed in S3. Default: no push."""
