"""The bill of materials of an image, in CycloneDX: its Python packages, and the Debian packages that its files are of.

Read from the image's own file system: what pip recorded, and what `image_build/runtime_root.py` did. The same image
gives the same file, byte by byte, so it has neither a time nor a random number.
"""

from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

LIBRARY = ComponentType.LIBRARY


def write_sbom(root: Path, name: str, version: str, digest: str, path: Path) -> int:
    """Writes the bill of materials of the image below `root`; returns the number of its components."""
    subject = Component(name=name, version=version, type=ComponentType.CONTAINER, bom_ref=name)
    subject.purl = PackageURL("oci", name=name, version=digest)

    components = [*_python_packages(root), *_debian_packages(root)]
    bom = Bom(components=components, serial_number=uuid5(NAMESPACE_URL, digest))
    bom.metadata.component = subject
    bom.metadata.timestamp = None  # type: ignore[assignment]  # which the format allows
    bom.register_dependency(subject, components)
    path.write_text(JsonV1Dot6(bom).output_as_string(indent=1) + "\n")
    return len(components)


def _python_packages(root: Path) -> Iterator[Component]:
    folders = sorted(root.glob("opt/finetune/lib/python3*/site-packages"))
    found = {package.metadata["Name"]: package for package in distributions(path=[str(each) for each in folders])}
    for name in sorted(found, key=str.lower):
        package = found[name]
        url = PackageURL("pypi", name=name.lower().replace("_", "-"), version=package.version)
        component = Component(name=name, version=package.version, type=LIBRARY, purl=url, bom_ref=str(url))
        if text := _licence(package):
            component.licenses.add(LicenseFactory().make_from_string(text))
        yield component


def _licence(package: Distribution) -> str | None:
    """The licence in one line, as the package says it; some put the whole text there, which is no name."""
    said = package.metadata.json
    text = str(said.get("license_expression") or said.get("license") or "").strip()
    return text if 0 < len(text) <= 100 and "\n" not in text else None


def _debian_packages(root: Path) -> Iterator[Component]:
    for status in sorted((root / "var/lib/dpkg/status.d").iterdir()):
        fields = dict(
            line.split(": ", 1) for line in status.read_text().splitlines() if ": " in line and line[0] != " "
        )
        url = PackageURL(
            "deb",
            "debian",
            fields["Package"],
            fields["Version"],
            {"arch": fields["Architecture"], "distro": "bookworm"},
        )
        yield Component(name=fields["Package"], version=fields["Version"], type=LIBRARY, purl=url, bom_ref=str(url))
