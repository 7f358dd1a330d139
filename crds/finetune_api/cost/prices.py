"""Prices of GPUs, as an administrator writes them into the chart's values; a job pays the first that fits its spec."""

from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, ValidationError

from finetune_api.base import ApiModel
from finetune_api.spec.run import ResourcesSpec


@dataclass(frozen=True)
class Price:
    """Price of one GPU for an hour, as one job pays it."""

    currency: str
    per_hour: float


class GpuPrice(ApiModel):
    """Price of one GPU for an hour."""

    node_selector: Annotated[dict[str, str], Field(max_length=16, default_factory=dict)]
    """Labels that a job's spec.resources.nodeSelector must have for this price; none fits every job."""

    gpu_resource_name: str | None = None
    """Value that spec.resources.gpuResourceName must have, such as nvidia.com/mig-3g.40gb; None fits every job."""

    per_hour: Annotated[float, Field(ge=0, le=1_000_000)]

    def fits(self, resources: ResourcesSpec) -> bool:
        """True if a job with these resources pays this price."""
        is_its_resource = self.gpu_resource_name in (None, resources.gpu_resource_name)
        return is_its_resource and self.node_selector.items() <= resources.node_selector.items()


class PriceTable(ApiModel):
    """All prices, the most special first."""

    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = "USD"
    """Currency by its ISO 4217 code."""

    gpus: Annotated[tuple[GpuPrice, ...], Field(max_length=64)] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads a table from JSON; raises ValueError with everything that is wrong."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            found = (f"{'.'.join(map(str, entry['loc'])) or 'the text'}: {entry['msg']}" for entry in error.errors())
            raise ValueError("; ".join(found)) from None

    def find(self, resources: ResourcesSpec) -> Price | None:
        """Returns the first price that fits; None if the table has none for the job."""
        return next((Price(self.currency, price.per_hour) for price in self.gpus if price.fits(resources)), None)
