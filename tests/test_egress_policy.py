"""What may leave a session, decided without a wire: names, ports, addresses, heads and ClientHellos.

C8 to C20 are the cases of the containment suite that end in a decision.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import socket
import ssl
import struct
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actbox.egress import heads, hello, policy
from actbox.egress.policy import Target, acceptable, decide, embedded, is_connectable, is_public
from actbox.egress.verdicts import Allowance, Reason, Record, Refusal, Verdict, escaped
from actbox.errors import InvalidArgument
from actbox.network import Network, canonical_host, canonical_port

NETWORK = Network(["ok.com", "*.wild.org", "other.net:8443", "http://plain.net"], private=["ok.com"])
TARGET = Target("ok.com", 443, plain=False, private=False)
PRIVATE = Target("ok.com", 443, plain=False, private=True)

LOOPBACK_SPELLINGS = ["2130706433", "0x7f.1", "127.1", "0177.0.0.1", "0", "①②⑦.0.0.1", "１２７.０.０.１", "0x7f000001"]
ADDRESSES = [
    "127.0.0.1",
    "[::1]",
    "::1",
    "[::ffff:127.0.0.1]",
    "169.254.169.254",
    "[fd00:ec2::254]",
    "1.1.1.1",
    "0.0.0.0",
]
UNUSABLE = [
    "127.0.0.1\0.ok.com",
    "ok.com\0",
    "ok.com\r\n",
    "a b.ok.com",
    "ok.com%00",
    "%2e.ok.com",
    "u@ok.com",
    "ok.com/",
    "",
]
LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=2, max_size=4).map(".".join).filter(lambda name: canonical_host(name) is not None)
# What resolvers are known to read as addresses, and what lies near it.
TRICKY = st.text(st.sampled_from("0123456789abcdefxX.-_%:[]\0 /@①１K。"), max_size=24)


def allowed(host: str, port: int = 443, *, plain: bool = False, network: Network = NETWORK) -> Target:
    decided = decide(network, host, port, plain=plain)
    assert isinstance(decided, Target), decided
    return decided


def refused(host: str, port: int = 443, *, plain: bool = False, network: Network = NETWORK) -> Refusal:
    decided = decide(network, host, port, plain=plain)
    assert isinstance(decided, Refusal), decided
    return decided


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["ok.com", "OK.COM", "ok.com.", "Ok.CoM."])
def test_case_and_one_dot_at_the_end_do_not_matter(host: str) -> None:
    """C12."""
    assert allowed(host) == Target("ok.com", 443, plain=False, private=True)


@pytest.mark.parametrize(
    "host",
    [
        *("evil-ok.com", "evilok.com", "ok.com.evil.com", "ok.co", "a.ok.com", "okxcom", "com", "wild.org"),
        *("evilwild.org", "a.wild.org.evil.com", "xn--k-fpa.com", "ok.com.com", f"{'a.' * 124}ok.com"),
    ],
)
def test_only_whole_labels_of_the_list_match(host: str) -> None:
    """C12."""
    assert refused(host).status == 403


@pytest.mark.parametrize(
    "host",
    ["ok..com", ".ok.com", "ok.com..", "-ok.com", "ok-.com", f"{'a' * 64}.com", "оk.com", "ok\u3002com", "o_k.com"],
)
def test_what_is_no_name_is_refused_as_such(host: str) -> None:
    """C12."""
    assert refused(host).reason is Reason.NOT_A_NAME


def test_a_name_has_at_most_253_characters() -> None:
    """C12."""
    longest = f"{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 61}"
    assert len(longest) == 253
    assert canonical_host(longest) == canonical_host(f"{longest}.") == longest
    assert canonical_host(f"{longest}d") is None


def test_a_suffix_means_what_is_below_it_alone() -> None:
    """C12."""
    assert allowed("a.wild.org").host == "a.wild.org"
    assert allowed("A.b.WILD.org.").host == "a.b.wild.org"
    assert refused("wild.org").reason is Reason.NOT_LISTED


@pytest.mark.parametrize("host", [*LOOPBACK_SPELLINGS, *ADDRESSES])
def test_no_spelling_of_an_address_is_a_name(host: str) -> None:
    """C10."""
    everything = Network(["*"], dangerously_allow_all=True)
    refusal = refused(host, network=everything)
    assert (refusal.status, refusal.reason) == (403, Reason.NOT_A_NAME)


@pytest.mark.parametrize("host", UNUSABLE)
def test_what_cannot_stand_in_a_host_is_a_malformed_request(host: str) -> None:
    """C11."""
    refusal = refused(host, network=Network(["*", "ok.com"], dangerously_allow_all=True))
    assert (refusal.status, refusal.reason) == (400, Reason.MALFORMED)
    assert refusal.message.isascii()
    assert refusal.message.isprintable()


@given(NAMES | TRICKY | st.text(max_size=20))
@example("127.0.0.1")
@example("1.2.3.0x")
@example("a.0x7f")
@example("\u212aelvin.com")
@example("ok.com\n")
def test_what_is_accepted_is_never_read_as_an_address(text: str) -> None:
    """C10: the resolver is asked as it would be asked, though it may not look anything up."""
    name = canonical_host(text)
    if name is None:
        return
    assert name == canonical_host(name)
    assert text.isascii()
    assert text.lower() in (name, f"{name}.")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
    with pytest.raises(ValueError, match=r"."):
        ipaddress.ip_address(name)
    with pytest.raises(OSError, match=r"."):
        socket.inet_aton(name)
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo(name, 1, flags=socket.AI_NUMERICHOST)


def test_the_resolver_would_read_what_is_refused_as_loopback() -> None:
    """C10: that the case before is none of straw: these are addresses to the system's resolver."""
    for spelling in ("2130706433", "0x7f.1", "127.1", "0177.0.0.1"):
        assert socket.getaddrinfo(spelling, 1, flags=socket.AI_NUMERICHOST)[0][4][0] == "127.0.0.1"


@given(NAMES, NAMES, st.booleans())
@example("ok.com", "evilok.com", True)
@example("ok.com", "ok.com", True)
@example("ok.com", "a.ok.com", False)
def test_a_name_matches_by_whole_labels_alone(listed: str, asked: str, wild: bool) -> None:  # noqa: FBT001 - drawn
    """C12."""
    network = Network([f"*.{listed}" if wild else listed], dangerously_allow_all=True)
    labels, wanted = asked.split("."), listed.split(".")
    below = len(labels) > len(wanted) and labels[-len(wanted) :] == wanted
    assert isinstance(decide(network, asked, 443, plain=False), Target) == (below if wild else asked == listed)


@given(NAMES, NAMES)
def test_what_is_below_a_listed_name_is_allowed_by_a_suffix(front: str, listed: str) -> None:
    host = f"{front}.{listed}"
    network = Network([f"*.{listed}"], dangerously_allow_all=True)
    assert allowed(host, network=network).host == host
    assert refused(f"{front}-{listed}", network=network)


# -- ports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", [22, 25, 80, 6379, 8443, 444])
def test_other_ports_are_refused(port: int) -> None:
    """C15."""
    assert refused("ok.com", port).reason is Reason.PORT


@pytest.mark.parametrize(
    "text", ["0", "65536", "443x", "", "00443", "+443", "4 43", "４４３", "-1", "1e3", "0x1bb", "443\n"]
)
def test_a_port_is_plain_digits(text: str) -> None:
    """C15."""
    assert canonical_port(text) is None


def test_a_named_port_stands_for_itself_alone() -> None:
    assert allowed("other.net", 8443).port == 8443
    assert refused("other.net", 443).reason is Reason.PORT


def test_plain_http_must_be_asked_for() -> None:
    assert refused("ok.com", 80, plain=True).reason is Reason.PORT
    assert refused("ok.com", 443, plain=True).reason is Reason.PORT
    assert allowed("plain.net", 80, plain=True)
    assert refused("plain.net", 80, plain=False).reason is Reason.PORT
    assert refused("plain.net", 443).reason is Reason.PORT


@pytest.mark.parametrize(
    ("network", "port"),
    [
        (Network(["a.net:80"]), 80),
        (Network(["a.net"], ports=(80, 443)), 80),
        (Network(["http://a.net"]), 80),
        (Network(["http://a.net:8080"]), 8080),
        (Network(["http://*.net:8080"], dangerously_allow_all=True), 8080),
        (Network(["http://*:8080"], dangerously_allow_all=True), 8080),
    ],
)
def test_port_80_and_what_begins_with_http_speak_plain_http_and_nothing_else(network: Network, port: int) -> None:
    assert allowed("a.net", port, plain=True, network=network).plain
    assert refused("a.net", port, plain=False, network=network).reason is Reason.PORT


# -- the value ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [Network(), Network([]), Network(()), Network(dangerously_allow_all=True)])
def test_an_empty_list_denies_everything(network: Network) -> None:
    """C20."""
    for host in ("ok.com", "localhost", "a.b.c"):
        assert refused(host, network=network).status == 403


@pytest.mark.parametrize("entry", ["*", "*:443", "http://*", "*.com", "*.org.", "*.co.uk", "*.com.au", "*.xn--p1ai"])
def test_an_entry_for_everybody_must_be_meant(entry: str) -> None:
    """C20."""
    with pytest.raises(InvalidArgument, match="dangerously_allow_all"):
        Network([entry])
    assert Network([entry], dangerously_allow_all=True).rules


def test_everything_is_still_only_names_ports_and_public_addresses() -> None:
    """C20."""
    network = Network(["*"], dangerously_allow_all=True)
    assert allowed("anything.example", network=network) == Target("anything.example", 443, plain=False, private=False)
    assert refused("anything.example", 22, network=network).reason is Reason.PORT
    assert refused("localhost", network=network).reason is Reason.NOT_A_NAME


@pytest.mark.parametrize(
    "entry",
    [
        *(
            "",
            ".",
            "com",
            "localhost",
            "127.0.0.1",
            "[::1]",
            "::1",
            "2130706433.1",
            "0x7f.1",
            "bücher.de",
            "ok.com/path",
        ),
        *(
            "https://ok.com",
            "HTTP://ok.com",
            "ok.com:0",
            "ok.com:65536",
            "ok.com:443x",
            "ok.com:",
            "u@ok.com",
            "*ok.com",
        ),
        *("a.*.com", "*.*.com", "**.ok.com", "*.", "*..com", "ok..com", " ok.com", "ok.com\n", "ok.com\0", "*.1"),
        *("http://", "http://*.", "ok.com,evil.com", "%2e.com", "ok.com..", "\u212a.com"),
    ],
)
def test_an_entry_is_a_name_or_an_error(entry: str) -> None:
    """C20."""
    with pytest.raises(InvalidArgument) as caught:
        Network([entry], dangerously_allow_all=True)
    assert caught.value.name == "network.allow"


@pytest.mark.parametrize(
    "arguments",
    [
        *({"allow": "ok.com"}, {"allow": None}, {"allow": [b"ok.com"]}, {"allow": [1]}, {"allow": {"ok.com": 1}}),
        *({"ports": ()}, {"ports": (0,)}, {"ports": (65536,)}, {"ports": ("443",)}, {"ports": (True,)}, {"ports": 443}),
        *({"private": ["ok.com"]}, {"allow": ["ok.com"], "private": ["*.ok.com"]}, {"private": "ok.com"}),
        *({"connections": 0}, {"connections": True}, {"connections": 5000}, {"bytes_up": 0}, {"bytes_down": 1.5}),
        *({"idle_seconds": 0}, {"idle_seconds": float("nan")}, {"idle_seconds": float("inf")}, {"header_seconds": "1"}),
        *({"header_bytes": 100}, {"header_bytes": 1 << 30}, {"dangerously_allow_all": 1}),
    ],
)
def test_what_cannot_be_meant_is_an_invalid_argument(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Network(**arguments)
    assert caught.value.name.startswith("network.")


def test_a_network_is_a_value() -> None:
    network = Network(["ok.com"], ports=[443], private=["OK.com."])
    assert network == Network(("ok.com",), private=("ok.com",))
    assert hash(network) == hash(Network(("ok.com",), private=("ok.com",)))
    assert network.allow == ("ok.com",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        network.allow = ("*",)  # pyright: ignore[reportAttributeAccessIssue]
    listed = ["ok.com"]
    kept = Network(listed)
    listed.append("evil.com")
    assert refused("evil.com", network=kept)


# -- addresses ------------------------------------------------------------------------------------------------------

NOT_PUBLIC = [
    *(
        "127.0.0.1",
        "127.255.255.254",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
    ),
    *(
        "0.1.2.3",
        "224.0.0.1",
        "239.255.255.250",
        "255.255.255.255",
        "240.0.0.1",
        "192.0.0.8",
        "192.0.2.1",
        "198.18.0.1",
    ),
    *("198.51.100.1", "203.0.113.1", "192.88.99.1", "168.63.129.16", "100.100.100.200", "192.0.0.192"),
    *(
        "::",
        "::1",
        "::2",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:169.254.169.254",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
    ),
    *(
        "64:ff9b::a00:1",
        "64:ff9b::a83f:8110",
        "64:ff9b:1::808:808",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "fe80::1",
        "fc00::1",
    ),
    *(
        "fd00:ec2::254",
        "ff02::1",
        "fec0::1",
        "2001:db8::1",
        "2001::1",
        "2001:0:7f00:1::",
        "3fff::1",
        "100::1",
        "5f00::1",
    ),
    *(
        "2606:4700::5efe:7f00:1",
        "2606:4700::200:5efe:10.0.0.1",
        "fe80::1%1",
        "2606:4700::1%1",
        "4000::1",
        "::ffff:0:8.8.8.8",
    ),
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "151.101.0.223", "2606:4700:4700::1111", "2a04:4e42::223", "64:ff9b::808:808"]


@pytest.mark.parametrize("text", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_dropped(text: str) -> None:
    """C13."""
    address = ipaddress.ip_address(text)
    assert not is_public(address)
    refusal = acceptable(TARGET, [address])
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.reason) == (403, Reason.NOT_PUBLIC)
    assert text not in refusal.message  # the guest learns no address


@pytest.mark.parametrize("text", PUBLIC)
def test_a_public_address_is_kept(text: str) -> None:
    """C13."""
    address = ipaddress.ip_address(text)
    assert is_public(address)
    assert acceptable(TARGET, [ipaddress.ip_address("10.0.0.1"), address]) == (address,)


@given(st.ip_addresses())
def test_nothing_that_python_calls_private_is_public(address: policy.Address) -> None:
    """C13."""
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast
        assert not address.is_link_local
        assert is_connectable(address)


@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:0:0", "64:ff9b::", "2002::", "2606:4700::5efe:0:0", "::"]))
@example(ipaddress.IPv4Address("169.254.169.254"), "64:ff9b::")
def test_an_address_within_an_address_decides(inner: ipaddress.IPv4Address, block: str) -> None:
    """C13."""
    shift = 80 if block == "2002::" else 0
    outer = ipaddress.IPv6Address(int(ipaddress.IPv6Address(block)) | int(inner) << shift)
    if int(outer) > 1:
        assert embedded(outer) == inner
    if not is_public(inner):
        assert not is_public(outer)


def test_an_ipv4_address_in_disguise_is_connected_to_as_what_it_is() -> None:
    """C13."""
    assert acceptable(TARGET, [ipaddress.ip_address("::ffff:8.8.8.8")]) == (ipaddress.ip_address("8.8.8.8"),)


@pytest.mark.parametrize("text", ["127.0.0.1", "10.1.2.3", "192.168.0.9", "::1", "fd12::1", "100.64.0.1", "8.8.8.8"])
def test_a_host_named_private_may_be_anywhere_near(text: str) -> None:
    assert acceptable(PRIVATE, [ipaddress.ip_address(text)]) == (ipaddress.ip_address(text),)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "fd00:ec2::254",
            "fe80::1",
            "0.0.0.0",
            "::",
        ),
        *("168.63.129.16", "100.100.100.200", "224.0.0.251", "255.255.255.255", "ff02::fb", "fe80::1%1", "0.0.0.1"),
    ],
)
def test_metadata_and_what_means_no_one_host_are_refused_even_then(text: str) -> None:
    """C8."""
    assert isinstance(acceptable(PRIVATE, [ipaddress.ip_address(text)]), Refusal)


def test_few_addresses_are_tried_and_none_twice() -> None:
    many = [ipaddress.ip_address(f"8.8.{n // 2}.8") for n in range(100)]
    assert acceptable(TARGET, many) == tuple(ipaddress.ip_address(f"8.8.{n}.8") for n in range(4))
    assert isinstance(acceptable(TARGET, []), Refusal)


# -- heads ----------------------------------------------------------------------------------------------------------


def parsed(head: bytes) -> heads.Connect | heads.Fetch:
    found = heads.parse(head)
    assert not isinstance(found, Refusal), found
    return found


def sent_on(head: bytes, target: Target | None = None) -> bytes:
    found = parsed(head)
    assert isinstance(found, heads.Fetch)
    return found.head(target or Target("ok.com", 80, plain=True, private=False))


def test_connect_names_a_host_and_a_port() -> None:
    assert parsed(b"CONNECT OK.com:443 HTTP/1.1\r\nHost: whatever\r\n\r\n") == heads.Connect("OK.com", 443)
    assert parsed(b"CONNECT ok.com:443 HTTP/1.0\r\n\r\n") == heads.Connect("ok.com", 443)
    assert parsed(b"CONNECT [::1]:443 HTTP/1.1\r\n\r\n") == heads.Connect("[::1]", 443)


@pytest.mark.parametrize(
    "line",
    [
        *(b"CONNECT ok.com HTTP/1.1", b"CONNECT ok.com: HTTP/1.1", b"CONNECT ok.com:0 HTTP/1.1", b"CONNECT ok.com:443"),
        *(b"CONNECT ok.com:65536 HTTP/1.1", b"CONNECT ok.com:443x HTTP/1.1", b"CONNECT ok.com:443 HTTP/2.0", b""),
        *(b"CONNECT  ok.com:443 HTTP/1.1", b"CONNECT 127.0.0.1\0.ok.com:443 HTTP/1.1", b"CONNECT a b:443 HTTP/1.1"),
        *(b"connect ok.com:443 HTTP/1.1", b"CONNECT ok.com:443 HTTP/1.1 ", b" CONNECT ok.com:443 HTTP/1.1"),
        *(b"CONNECT\tok.com:443\tHTTP/1.1", b"GET / HTTP/1.1", b"GET https://ok.com/ HTTP/1.1", b"PRI * HTTP/2.0"),
        *(b"GET ftp://ok.com/ HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET //ok.com/ HTTP/1.1", b"GET http://ok.com"),
        *(b"GET http://ok.com/#x HTTP/1.1", b"GET http://ok.com:/ HTTP/1.1", b"GET http://ok.com:080/ HTTP/1.1"),
        *(
            b"GET http://ok.com/\xc3\xa9 HTTP/1.1",
            b"GET http://ok.com/ HTTP/1.1\rX: y",
            b"\r\nGET http://ok.com/ HTTP/1.1",
        ),
    ],
)
def test_a_malformed_request_line_is_a_400(line: bytes) -> None:
    """C15, C17."""
    refusal = heads.parse(line + b"\r\n\r\n")
    assert isinstance(refusal, Refusal)
    assert refusal.status == 400


@pytest.mark.parametrize(
    "field",
    [
        *(
            b"X: a\r\n folded: b",
            b" X: folded",
            b"X : y",
            b": y",
            b"X",
            b"X: a\nY: b",
            b"X: a\rb",
            b"X: \0",
            b"X\0: y",
            b"X: \x7f",
        ),
        *(
            b"Host: ok.com\r\nHost: evil.com",
            b"host: ok.com\r\nHOST: ok.com",
            b"Content-Length: 1\r\nContent-Length: 1",
        ),
        *(b"Content-Length: 1\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked\r\nContent-length: 0"),
        *(
            b"Content-Length: -1",
            b"Content-Length: +1",
            b"Content-Length: 1, 1",
            b"Content-Length: 0x1",
            b"Content-Length:",
        ),
        *(b"Content-Length: 9999999999999999999", "Content-Length: ٣".encode()),
    ],
)
def test_a_head_that_can_be_read_in_two_ways_is_a_400(field: bytes) -> None:
    """C17."""
    for line in (b"GET http://ok.com/ HTTP/1.1", b"CONNECT ok.com:443 HTTP/1.1"):
        refusal = heads.parse(line + b"\r\n" + field + b"\r\n\r\n")
        assert isinstance(refusal, Refusal)
        assert refusal.status == 400


@pytest.mark.parametrize(
    "value",
    [b"chunked", b"Chunked", b"gzip, chunked", b"xchunked", b"identity", b"", b"chunked\r\nTransfer-Encoding: x"],
)
def test_no_transfer_encoding_is_taken(value: bytes) -> None:
    """C17."""
    refusal = heads.parse(b"POST http://ok.com/ HTTP/1.1\r\nTransfer-Encoding: " + value + b"\r\n\r\n")
    assert isinstance(refusal, Refusal)
    assert refusal.status == 411


@pytest.mark.parametrize("field", [b"Content-Length: 0", b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_connect_has_no_body(field: bytes) -> None:
    """C17."""
    refusal = heads.parse(b"CONNECT ok.com:443 HTTP/1.1\r\n" + field + b"\r\n\r\n")
    assert isinstance(refusal, Refusal)
    assert refusal.status == 400


def test_many_fields_are_a_431() -> None:
    """C17."""
    refusal = heads.parse(b"GET http://ok.com/ HTTP/1.1\r\n" + b"a: b\r\n" * 100_000 + b"\r\n")
    assert isinstance(refusal, Refusal)
    assert refusal.status == 431


def test_the_host_field_is_the_target_whatever_the_guest_wrote() -> None:
    """C16."""
    head = sent_on(b"GET http://OK.com./a?b HTTP/1.1\r\nHost: evil.com\r\nX-Mine: 1\r\n\r\n")
    assert head == b"GET /a?b HTTP/1.1\r\nHost: ok.com\r\nX-Mine: 1\r\nConnection: close\r\n\r\n"
    elsewhere = Target("ok.com", 8080, plain=True, private=False)
    assert b"\r\nHost: ok.com:8080\r\n" in sent_on(b"GET http://ok.com:8080?x HTTP/1.1\r\n\r\n", elsewhere)


def test_what_is_between_neighbours_is_not_passed_on() -> None:
    """C17."""
    head = sent_on(
        b"POST http://ok.com HTTP/1.1\r\nConnection: keep-alive, X-Hop, content-length\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n"
        b"Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic eDp5\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
        b"TE: trailers\r\n"
        b"Content-Length: 007\r\nAuthorization: Bearer z\r\n\r\n"
    )
    assert head == (
        b"POST / HTTP/1.1\r\nHost: ok.com\r\nAuthorization: Bearer z\r\nContent-Length: 7\r\nConnection: close\r\n\r\n"
    )


FRAGMENTS = st.sampled_from(
    [
        b"GET ",
        b"CONNECT ",
        b"http://",
        b"ok.com",
        b":443",
        b"/",
        b" HTTP/1.1",
        b"\r\n",
        b"\n",
        b"Host: a",
        b"Content-Length: 3",
    ]
)
BYTES = st.lists(FRAGMENTS | st.binary(max_size=4), max_size=12).map(b"".join)


@given(BYTES)
@example(b"GET http://ok.com/ HTTP/1.1\r\nHost: a\nHost: b")
def test_whatever_is_sent_on_is_one_head_with_one_host(data: bytes) -> None:
    """C16, C17."""
    found = heads.parse(data + b"\r\n\r\n")
    if isinstance(found, heads.Fetch):
        head = found.head(Target("ok.com", 80, plain=True, private=False))
        lines = head.split(b"\r\n")
        assert heads.end_of_head(head) == len(head)
        assert b"\n" not in head.replace(b"\r\n", b"")
        assert [line for line in lines if line.lower().startswith(b"host:")] == [b"Host: ok.com"]
        assert sum(line.lower().startswith(b"content-length:") for line in lines) == (found.length is not None)
        assert not any(line.lower().startswith(b"transfer-encoding") for line in lines)


@given(BYTES, st.lists(st.integers(0, 100), max_size=4))
def test_a_head_ends_where_it_ends_however_it_comes(data: bytes, cuts: list[int]) -> None:
    whole = heads.end_of_head(data)
    seen = 0
    for stop in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        end = heads.end_of_head(data[:stop], seen)
        if end is not None:
            # A lone line feed may complete what a piece before had begun, never the other way round.
            assert whole is not None
            assert end >= whole
            return
        seen = stop
    assert whole is None


@pytest.mark.parametrize(
    "first", [b"\x16\x03\x01", b"\x05\x01\x00", b"\x04\x01", b"\0", b"get", b" GET", b"\r\n", b"\xc3\x89"]
)
def test_what_cannot_become_http_is_seen_at_its_first_byte(first: bytes) -> None:
    """C21."""
    assert not heads.looks_like_http(first)


def test_an_answer_says_that_it_is_the_last() -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nKeep-Alive: timeout=5\r\nContent-Length: 2\r\n\r\n"
    final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n"
    assert heads.answer(head, b"GET") == heads.Answer(200, final, 2)
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert heads.answer(interim, b"GET") == heads.Answer(100, interim, 0)
    for bad in (b"SSH-2.0-x\r\n\r\n", b"HTTP/2 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\n\n", b"HTTP/1.1 20 OK\r\n\r\n"):
        assert heads.answer(bad, b"GET") is None


@pytest.mark.parametrize(
    ("method", "head", "length"),
    [
        (b"GET", b"200 OK", None),
        (b"GET", b"200 OK\r\ncontent-length: 12", 12),
        (b"GET", b"200 OK\r\nContent-Length: 1\r\nContent-Length: 2", None),
        (b"GET", b"200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", None),
        (b"GET", b"200 OK\r\nContent-Length: -1", None),
        (b"HEAD", b"200 OK\r\nContent-Length: 12", 0),
        (b"GET", b"204", 0),
        (b"GET", b"304 Not Modified\r\nContent-Length: 12", 0),
    ],
)
def test_where_an_answer_ends(method: bytes, head: bytes, length: int | None) -> None:
    found = heads.answer(b"HTTP/1.1 " + head + b"\r\n\r\n", method)
    assert found is not None
    assert found.length == length


def test_a_refusal_says_all_in_its_status_line() -> None:
    answer = heads.refuse(Refusal(403, Reason.NOT_LISTED, "evil.com is not on the allow-list of this session"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 Forbidden: evil.com is not on the allow-list of this session\r\n")
    assert body == b"evil.com is not on the allow-list of this session\n"
    assert f"Content-Length: {len(body)}".encode() in head


# -- ClientHellos -----------------------------------------------------------------------------------------------------


@functools.cache
def client_hello(name: str | None = "ok.com", *, old: bool = False) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if name is None:
        context.check_hostname = False
    if old:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def with_extension(data: bytes, number: int, body: bytes, *, first: bool = False) -> bytes:
    """A ClientHello of one record, with an extension more: as the first, for some may not come last, or the last."""
    message = bytearray(data[5:])
    at = 4 + 34
    at += 1 + message[at]
    at += 2 + int.from_bytes(message[at : at + 2])
    at += 1 + message[at]
    extension = struct.pack("!HH", number, len(body)) + body
    extensions = bytes(message[at + 2 :])
    extensions = extension + extensions if first else extensions + extension
    hello_ = bytes(message[4:at]) + struct.pack("!H", len(extensions)) + extensions
    return as_records(b"\x01" + len(hello_).to_bytes(3) + hello_, 1 << 14)


def as_records(message: bytes, size: int) -> bytes:
    return b"".join(
        b"\x16\x03\x01" + len(message[at : at + size]).to_bytes(2) + message[at : at + size]
        for at in range(0, len(message), size)
    )


def read_hello(data: bytes) -> hello.Hello | None:
    return hello.HelloReader().feed(data)


@pytest.mark.parametrize("old", [False, True])
def test_the_server_name_is_read(old: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """C18."""
    assert read_hello(client_hello("ok.com", old=old)) == hello.Hello("ok.com", hides=False)
    assert read_hello(client_hello(None, old=old)) == hello.Hello(None, hides=False)


def test_a_hello_is_read_byte_by_byte_and_in_many_records() -> None:
    data = client_hello()
    for form in (data, as_records(data[5:], 7)):
        reader = hello.HelloReader()
        answers = [reader.feed(form[at : at + 1]) for at in range(len(form))]
        assert answers == [None] * (len(form) - 1) + [hello.Hello("ok.com", hides=False)]


def test_what_follows_a_hello_is_not_looked_at() -> None:
    assert read_hello(client_hello() + b"\x17\x03\x03\x00\x05early") == hello.Hello("ok.com", hides=False)


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"GET / HTTP/1.1\r\nHost: ok.com\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.6\r\n",
            b"EHLO ok.com\r\n",
            b"\x05\x01\x00",
            b"\0" * 64,
        ),
        *(
            b"CONNECT evil.com:443 HTTP/1.1\r\n\r\n",
            b"\x17\x03\x03\x00\x05hello",
            b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        ),
    ],
)
def test_what_is_not_tls_is_seen(data: bytes) -> None:
    """C18."""
    with pytest.raises(hello.NotTLS):
        read_hello(data)


def test_a_hello_without_end_is_given_up() -> None:
    """C18."""
    reader = hello.HelloReader()
    data = as_records(b"\x01\x00\xff\xff" + bytes(60_000), 1000)
    fed = 0
    with pytest.raises(hello.NotTLS):  # noqa: PT012 - whichever piece it is
        for at in range(0, len(data), 500):
            fed = at
            assert reader.feed(data[at : at + 500]) is None
    assert hello.MOST_BYTES - 500 <= fed <= hello.MOST_BYTES + 500


def test_a_hello_in_the_smallest_pieces_costs_little() -> None:
    """The work grows with the bytes, not with their square: each is looked at once."""
    data = as_records(b"\x01\x00\xff\xff" + bytes(2000), 1)
    reader = hello.HelloReader()
    began = time.process_time()
    assert {reader.feed(data[at : at + 1]) for at in range(len(data))} == {None}
    assert time.process_time() - began < 2


@pytest.mark.parametrize("number", [0xFE0D, 0xFFCE])
def test_a_hidden_name_is_seen(number: int) -> None:
    """C18."""
    found = read_hello(with_extension(client_hello(), number, b"\0" * 40, first=True))
    assert found is not None
    assert found == hello.Hello("ok.com", hides=True)
    refusal = hello.judge(found, TARGET)
    assert refusal is not None
    assert refusal.reason is Reason.HIDDEN_SERVER_NAME


def test_two_names_in_one_hello_are_not_read() -> None:
    """C18."""
    second = b"\x00\x0b\x00\x00\x08evil.com"
    for first in (True, False):
        with pytest.raises(hello.NotTLS):
            read_hello(with_extension(client_hello(), 0, second, first=first))
    both = b"\x00\x14\x00\x00\x06ok.com" + second[2:]
    with pytest.raises(hello.NotTLS):
        read_hello(with_extension(client_hello(None), 0, both, first=True))


def test_each_reading_of_a_hello_may_object(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = with_extension(with_extension(client_hello(), 0x1234, b"", first=True), 0x1234, b"", first=True)
    found: list[str | None] = ["ok.com"]
    monkeypatch.setattr(hello, "_as_openssl_reads", lambda _data: found)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    assert read_hello(client_hello()) == hello.Hello("ok.com", hides=False)
    with pytest.raises(hello.NotTLS):
        read_hello(twice)
    for other in (["evil.com"], [None], []):
        found[:] = other
        with pytest.raises(hello.NotTLS):
            read_hello(client_hello())


@pytest.mark.parametrize("name", [b"ok.com\0.evil.com", b"ok.com\xff", b"", b"evil.com."])
def test_a_strange_name_in_a_hello_is_not_for_us(name: bytes) -> None:
    body = struct.pack("!HBH", len(name) + 3, 0, len(name)) + name
    try:
        found = read_hello(with_extension(client_hello(None), 0, body, first=True))
    except hello.NotTLS:
        return
    assert found is not None
    assert hello.judge(found, TARGET) is not None


@pytest.mark.parametrize("name", ["evil.com", "ok.com.evil.com", "a.ok.com", "evilok.com", "ok.co", "ok.com.", None])
def test_another_name_or_none_is_refused(name: str | None) -> None:
    """C18."""
    assert hello.judge(hello.Hello(name, hides=False), TARGET) is not None


@pytest.mark.parametrize("name", ["ok.com", "OK.com"])
def test_the_same_name_is_taken(name: str) -> None:
    """C18."""
    assert hello.judge(hello.Hello(name, hides=False), TARGET) is None


@given(st.integers(0, 600), st.integers(0, 255), st.binary(max_size=4))
def test_a_damaged_hello_is_judged_or_given_up(at: int, value: int, more: bytes) -> None:
    """C18."""
    data = bytearray(client_hello())
    data[at % len(data)] = value
    data[at % len(data) : at % len(data)] = more
    try:
        found = read_hello(bytes(data))
    except hello.NotTLS:
        return
    if found is not None and hello.judge(found, TARGET) is None:
        assert b"\x00\x00\x06ok.com" in bytes(data).lower()


# -- the log ----------------------------------------------------------------------------------------------------------


@given(st.text(max_size=300))
@example("\x1b]0;pwned\x07\r\n'\"")
def test_what_is_logged_of_the_guests_words_is_printable_and_short(text: str) -> None:
    """G18."""
    safe = escaped(text)
    assert len(safe) <= 120
    assert not safe or (safe.isascii() and safe.isprintable())


def test_a_record_is_one_line() -> None:
    """G18."""
    record = Record(0.0, "ok.com", 443, "8.8.8.8", Verdict.ALLOWED, Reason.ENDED, 12, 34, 0.5, 2)
    assert str(record) == (
        "1970-01-01T00:00:00.000+00:00 allowed ok.com:443 (8.8.8.8): ended by one of the two sides; "
        "12 bytes up, 34 down, 0.500 s; 2 more before it"
    )


def test_refusals_without_end_are_counted_and_not_logged() -> None:
    allowance = Allowance(burst=3)
    taken = [allowance.take(Verdict.REFUSED) for _ in range(1000)]
    assert taken[:3] == [0, 0, 0]
    assert taken.count(None) >= 990
    assert (allowance.take(Verdict.ALLOWED) or 0) >= 1
    assert allowance.take(Verdict.CUT) == 0
