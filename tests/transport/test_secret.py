import os
import pickle
import stat

import pytest

from muonwire.cli.main import main
from muonwire.errors import UsageError
from muonwire.transport.secret import Secret, find_secret, write_secret


def test_a_written_secret_is_read_by_its_owner_alone(tmp_path):
    path = tmp_path / "run.secret"
    write_secret(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Secret.read(path) == Secret(path.read_bytes().strip())
    with pytest.raises(UsageError, match="File exists"):
        write_secret(path)
    path.chmod(0o640)
    with pytest.raises(UsageError, match=r"mode 640.*chmod 600"):
        Secret.read(path)


@pytest.mark.parametrize("content", [b"", b"short", b"a" * 64, b"  fifteen bytes! \n\n", b"abab" * 20])
def test_what_can_be_guessed_is_refused(tmp_path, content):
    path = tmp_path / "run.secret"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match=r"run\.secret has .* at least 16 random bytes.*muonwire secret"):
        Secret.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"nothing\.secret cannot be read \(No such file"):
        Secret.read(tmp_path / "nothing.secret")
    monkeypatch.setenv("MUONWIRE_SECRET_FILE", str(tmp_path / "named.secret"))
    with pytest.raises(UsageError, match=r"named\.secret cannot be read"):
        find_secret()
    monkeypatch.setenv("MUONWIRE_SECRET_FILE", "")
    assert find_secret() is None


def test_the_file_given_goes_before_the_variable(tmp_path, monkeypatch):
    for name in ("given", "named"):
        write_secret(tmp_path / name)
    monkeypatch.setenv("MUONWIRE_SECRET_FILE", str(tmp_path / "named"))
    assert find_secret(tmp_path / "given") == Secret.read(tmp_path / "given")
    assert find_secret() == Secret.read(tmp_path / "named")
    assert find_secret() != Secret.read(tmp_path / "given")


def test_tags_depend_on_secret_and_content_and_a_secret_stays_here():
    one, other = Secret(bytes(range(16))), Secret(bytes(range(1, 17)))
    tag = one.tag([b"con", b"tent"])
    assert one.verifies(tag, [b"content"])
    assert not one.verifies(tag, [b"contents"])
    assert not other.verifies(tag, [b"content"])
    assert not one.derive([b"x"]).verifies(tag, [b"content"])
    assert "0001" not in repr(one)
    with pytest.raises(UsageError, match="cannot be pickled"):
        pickle.dumps(one)


def test_the_command_makes_one_and_train_refuses_a_bad_one(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run.secret"
    with pytest.raises(SystemExit) as ended:
        main(["secret", str(path)])
    assert ended.value.code == 0
    assert len(path.read_text().strip()) == 64
    path.chmod(0o644)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--secret-file", str(path), "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "mode 644" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["run.secret"]  # noqa: PTH208
