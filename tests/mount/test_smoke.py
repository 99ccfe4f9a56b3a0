from pathlib import Path


def test_it_is_there(backup: Path) -> None:
    (backup / "1").write_bytes(b"x" * 4096)
    assert (backup / "1").read_bytes() == b"x" * 4096
    assert [p.name for p in backup.iterdir()] == ["1"]
