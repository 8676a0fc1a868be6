"""What a table says of itself is looked at before it is read, and a message repeats no cell at length."""

import io
import zipfile

import numpy as np
import pytest

from gpubackprop import tables
from gpubackprop.tables import read_table


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)


@pytest.fixture
def unread(monkeypatch):
    """No array is to be read."""
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("it was read"))


def test_lengths_that_differ_are_said_before_anything_is_read(tmp_path, unread):
    np.savez_compressed(tmp_path / "t.npz", x=np.zeros((200_000, 5), np.uint8), y=np.zeros(3))
    with pytest.raises(ValueError, match=r"t\.npz: x has 200000 rows but y has 3; pass one y per row of x"):
        read_table(tmp_path / "t.npz")


def test_an_array_beyond_the_memory_is_refused_before_it_is_read(tmp_path, unread, monkeypatch):
    monkeypatch.setattr(tables, "_memory", lambda: 10**6)
    np.savez_compressed(tmp_path / "t.npz", x=np.zeros((200_000, 5), np.uint8), y=np.zeros(200_000))
    message = r"t\.npz: cannot be read as npz \(x of shape \(200000, 5\) takes 8,000,000 bytes, and this machine"
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "t.npz")


@pytest.mark.parametrize("more", [-8, 8, 10**6])
def test_an_array_that_is_not_as_long_as_it_says_is_refused(more, tmp_path, unread):
    content = npy(np.zeros((100, 2)))
    write_npz(tmp_path / "t.npz", x=content[:more] if more < 0 else content + bytes(more))
    with pytest.raises(
        ValueError, match=r"t\.npz: cannot be read as npz \(x has .* bytes, but its shape \(100, 2\) takes"
    ):
        read_table(tmp_path / "t.npz")


@pytest.mark.parametrize("make", [np.savez, np.savez_compressed])
def test_plain_files_are_read_as_before(make, tmp_path, rng):
    x, y = rng.normal(size=(6, 2)), np.array(["a", "b"] * 3)
    make(tmp_path / "t.npz", x=np.asfortranarray(x), y=y)
    table = read_table(tmp_path / "t.npz")
    np.testing.assert_array_equal(table.x, x)
    assert table.classes == ["a", "b"] and read_table(tmp_path / "t.npz", labelled=False).y is None


LONG = "z" * 100_000


@pytest.mark.parametrize("header, row, more", [
    ("a,y", f"{LONG},1", {}),
    (f"{LONG},y", "q,1", {}),
    ("a,y", f"1,{LONG}", {"classes": ["b"], "columns": ["a"]}),
    (f"{LONG},b", "1,2", {"target": "y"}),
    ("a,b", "1,2", {"target": LONG}),
    ("a,y", f"1,0.5\n1,{LONG}", {}),
])  # fmt: skip
def test_messages_repeat_no_cell_at_length(header, row, more, tmp_path):
    (tmp_path / "t.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(ValueError, match=r"t\.csv: ") as caught:
        read_table(tmp_path / "t.csv", **({"target": "y"} | more))
    assert len(str(caught.value)) < 1000
