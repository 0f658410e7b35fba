"""WireGuard as docs/wireguard.md has it: the files that the script makes, and replicas that train over the tunnel."""

import configparser
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from muonwire.transport.secret import write_secret
from muonwire.compare.hosts import hosts, namespaces_allowed
from tests.transport.test_rendezvous import JOIN, TRAIN, end, start
from tests.tunnels import SCRIPT, make_files, missing_for_tunnels, tunnel


def read(path):
    """The sections of a configuration: the interface, and the peers by their public keys."""
    interface, *peers = path.read_text().split("[Peer]")
    parse = configparser.ConfigParser()
    parse.optionxform = str
    parse.read_string(interface)
    found = []
    for peer in peers:
        parser = configparser.ConfigParser()
        parser.optionxform = str
        parser.read_string("[Peer]" + peer)
        found.append(dict(parser["Peer"]))
    return dict(parse["Interface"]), {peer["PublicKey"]: peer for peer in found}


@pytest.mark.parametrize("without_wg", [False, True])
def test_every_machine_gets_a_file_that_fits_the_others(without_wg, tmp_path, monkeypatch):
    if without_wg:
        # Only python3 and openssl are to be found.
        only = tmp_path / "bin"
        only.mkdir()
        (only / "openssl").symlink_to(shutil.which("openssl"))
        monkeypatch.setenv("PATH", str(only))
    out = tmp_path / "tunnel"
    make_files(
        ["ada=203.0.113.5", "ben=[2001:db8::7]:4500", "cleo=", "--network", "10.5.0.0/28", "--out", out]
    )
    files = {name: out / name / "muonwire.conf" for name in ("ada", "ben", "cleo")}
    for path in files.values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    made = {name: read(path) for name, path in files.items()}
    public = {name: _public(interface["PrivateKey"]) for name, (interface, _) in made.items()}
    assert len({interface["PrivateKey"] for interface, _ in made.values()}) == 3
    for name, (interface, peers) in made.items():
        others = set(made) - {name}
        assert set(peers) == {public[other] for other in others}
        for other in others:
            peer = peers[public[other]]
            assert f"{peer['AllowedIPs'].removesuffix('/32')}/28" == made[other][0]["Address"]
            assert peer["PersistentKeepalive"] == "25"
        assert interface["ListenPort"] == ("4500" if name == "ben" else "51820")
    assert [interface["Address"] for interface, _ in made.values()] == [f"10.5.0.{i}/28" for i in (1, 2, 3)]
    cleo = made["cleo"][1]
    assert {cleo[public[n]]["Endpoint"] for n in ("ada", "ben")} == {
        "203.0.113.5:51820",
        "[2001:db8::7]:4500",
    }
    assert "Endpoint" not in made["ada"][1][public["cleo"]]


def _public(private):
    """The public key that belongs to a private one, by openssl alone."""
    import base64

    start_of_key = bytes.fromhex("302e020100300506032b656e04220420")
    given = start_of_key + base64.b64decode(private)
    command = [shutil.which("openssl", path="/usr/bin:/bin:/usr/local/bin") or "openssl", "pkey"]
    done = subprocess.run(
        [*command, "-inform", "DER", "-pubout", "-outform", "DER"],
        input=given,
        capture_output=True,
        check=True,
    )
    return base64.b64encode(done.stdout[-32:]).decode()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["ada=1.2.3.4", "nonsense"], "'nonsense'; a machine is NAME=ADDRESS"),
        (["ada=1.2.3.4", "ada=1.2.3.5"], "two machines are called 'ada'"),
        (["ada=1.2.3.4"], "1 machine(s), of which 0 have no address"),
        (["ada=", "ben=", "cleo=1.2.3.4"], "of which 2 have no address (ada, ben)"),
        (["a=1.2.3.4", "b=1.2.3.5", "c=1.2.3.6", "--network", "10.0.0.0/30"], "no room for 3 machines"),
    ],
)
def test_what_makes_no_network_is_refused(words, reason, tmp_path):
    done = make_files([*words, "--out", tmp_path / "tunnel"], check=False)
    assert done.returncode == 1
    assert reason in done.stderr
    assert not (tmp_path / "tunnel").exists()


def test_keys_are_not_overwritten(tmp_path):
    words = ["ada=1.2.3.4", "ben=1.2.3.5", "--out", tmp_path / "tunnel"]
    make_files(words)
    before = (tmp_path / "tunnel" / "ada" / "muonwire.conf").read_text()
    done = make_files(words, check=False)
    assert "is there already" in done.stderr
    assert (tmp_path / "tunnel" / "ada" / "muonwire.conf").read_text() == before


def test_public_addresses_are_refused_on_both_and_the_tunnel_is_taken(tmp_path, free_port):
    """Where a tunnel cannot be made, the secret is tested without it, and what is missing is printed."""
    missing = missing_for_tunnels()
    secret = tmp_path / "run.secret"
    write_secret(secret)
    train = ["-m", "muonwire", "train", *TRAIN, "--secret-file", secret, "--out", "run"]
    with hosts(2, network="198.51.100") as machines:
        if namespaces_allowed():
            for code, said in _both(machines, ["-c", JOIN, "20"], tmp_path / "public", free_port):
                assert code == 1, said
                assert (
                    "refused: replicas: replica 0 on wan0 (198.51.100.1), replica 1 on wan0 (198.51.100.2) would listen where the "
                    "internet may reach it" in said
                ), said
        if missing:
            print(f"no tunnel is made here, for want of {', '.join(missing)}: the replicas train without one")
            ended = _both(machines, train, tmp_path / "train", free_port)
        else:
            with tunnel(machines, tmp_path) as inside:
                ended = _both(inside, train, tmp_path / "train", free_port)
    for rank, (code, said) in enumerate(ended):
        assert code == 0, said
        if not missing:
            assert f"replica {rank} of 2: on muonwire (10.99.0.{rank + 1})" in said
    assert "step 4: evaluation loss" in ended[0][1]


def _both(machines, words, folder, port):
    """Exit code and output of a replica on each machine."""
    processes = []
    for rank, machine in enumerate(machines):
        place = folder / f"host{rank}"
        place.mkdir(parents=True)
        processes.append(
            start(
                machine,
                words,
                rank=rank,
                world_size=len(machines),
                master=machines[0].address,
                port=port,
                folder=place,
            )
        )
    codes = end(processes, 120)
    logs = [(folder / f"host{r}" / f"replica{r}.log").read_text() for r in range(len(machines))]
    return list(zip(codes, logs, strict=True))


def test_the_how_to_names_the_script_and_its_files():
    page = (Path(__file__).parents[1] / "docs" / "wireguard.md").read_text()
    assert str(SCRIPT.relative_to(Path(__file__).parents[1])) in page
    assert sys.executable
    for word in ("wg-quick up muonwire", "--master-addr 10.99.0.1", "muonwire secret"):
        assert word in page
