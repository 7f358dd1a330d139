"""The policy about endpoints: what it refuses in every way of writing an address, and what it lets pass."""

import pytest

from finetune_api.spec.endpoints import EndpointPolicy

DEFAULT = EndpointPolicy(api_server="10.96.0.1:443")
REFUSED_URLS = {
    "metadata": "http://169.254.169.254/latest",
    "metadata by name": "http://metadata.google.internal",
    "metadata by name, with the root's dot": "http://METADATA.google.internal.",
    "one decimal number": "http://2852039166",
    "octal parts": "http://0251.0376.0251.0376",
    "one hexadecimal number": "http://0xa9fea9fe",
    "two parts": "http://169.16689662",
    "mapped into IPv6": "http://[::ffff:169.254.169.254]:80",
    "6to4": "http://[2002:a9fe:a9fe::1]",
    "NAT64": "http://[64:ff9b::a9fe:a9fe]",
    "metadata of AWS over IPv6": "http://[fd00:ec2::254]",
    "credentials of ECS": "http://169.254.170.2",
    "link-local IPv6": "http://[fe80::1]",
    "loopback": "https://127.0.0.1:9000",
    "loopback, shortened": "http://127.1",
    "loopback over IPv6": "http://[::1]",
    "loopback by name": "http://minio.localhost:9000",
    "any address, which is this host": "http://0.0.0.0",
    "any address, as a number": "http://0",
    "any address over IPv6": "http://[::]",
    "multicast": "http://224.0.0.1",
    "broadcast": "http://255.255.255.255",
    "the API server": "https://10.96.0.1",
    "the API server by name": "https://kubernetes.default.svc.cluster.local",
    "no port that exists": "http://minio:99999",
}


@pytest.mark.parametrize("url", REFUSED_URLS.values(), ids=REFUSED_URLS)
def test_what_leads_to_credentials_or_into_the_node_is_always_refused(url: str) -> None:
    assert DEFAULT.refuse_url(url)
    assert EndpointPolicy(hosts=("*",), api_server=DEFAULT.api_server).refuse_url(url)


@pytest.mark.parametrize(
    "url",
    ["https://minio.example.com:9000", "http://minio.storage.svc:9000", "http://10.1.2.3:9000", "http://[fd12::1]",
     "http://8.8.8.8", "https://10.96.0.1:8443"],
)  # fmt: skip
def test_stores_in_the_cluster_and_elsewhere_are_allowed(url: str) -> None:
    assert DEFAULT.refuse_url(url) is None


@pytest.mark.parametrize("address", ["10.1.2.3", "192.168.0.1", "172.16.0.1", "100.64.0.1", "fd12::1"])
def test_an_administrator_may_refuse_private_networks(address: str) -> None:
    policy = EndpointPolicy(private=False)
    assert "public addresses only" in (policy.refuse_address(address, 443) or "")
    assert policy.refuse_address("8.8.8.8", 443) is None
    assert DEFAULT.refuse_address(address, 443) is None


def test_an_administrator_may_list_the_hosts() -> None:
    policy = EndpointPolicy(hosts=("*.example.com", "minio.storage.svc"))
    assert policy.refuse_url("https://s3.EXAMPLE.com") is None
    refusal = policy.refuse_url("https://example.com.evil.org") or ""
    assert "example.com.evil.org" in refusal
    assert "*.example.com, minio.storage.svc" in refusal
