"""Files for the command line: what is read from good ones, and every fault of a bad one by its message."""

import io
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpubackprop import datasets
from gpubackprop.tables import read_table

IRIS = "length,width,species\n5.1,3.5,setosa\n7.0,3.2,versicolor\n6.3,3.3,virginica\n4.9,3.0,setosa\n"


@pytest.fixture
def csv(tmp_path):
    """Write a CSV (text or bytes) and give its path."""

    def write(content, name="t.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def npz(tmp_path):
    """Write an npz of the arrays and give its path."""

    def write(**arrays):
        np.savez(tmp_path / "t.npz", **arrays)
        return tmp_path / "t.npz"

    return write


# ---- good CSVs ---------------------------------------------------------------------------------------------


def test_text_targets_are_classes(csv):
    table = read_table(csv(IRIS), target="species")
    assert (table.columns, table.target, table.task) == (["length", "width"], "species", "classification")
    assert table.classes == ["setosa", "versicolor", "virginica"]
    assert table.y.dtype == np.int64 and table.y.tolist() == [0, 1, 2, 0]
    assert table.x.dtype == np.float64 and table.x.tolist() == [
        [5.1, 3.5],
        [7.0, 3.2],
        [6.3, 3.3],
        [4.9, 3.0],
    ]


def test_integer_targets_are_classes_in_numeric_order(csv):
    table = read_table(csv("y,a\n10,1\n9,2\n-1,3\n010,4\n"), "y")
    assert table.classes == ["-1", "9", "10"] and table.y.tolist() == [2, 1, 0, 2] and table.columns == ["a"]


def test_float_targets_are_regression(csv):
    table = read_table(csv("a,y\n1,0.5\n2,1\n"), "y")
    assert table.task == "regression" and table.classes is None
    assert table.y.tolist() == [[0.5], [1.0]] and table.y.dtype == np.float64


def test_the_task_can_be_named(csv):
    floats, integers = csv("a,y\n1,0.5\n2,1\n3,1.0\n"), csv("a,y\n1,3\n2,4\n", "i.csv")
    table = read_table(floats, "y", task="classification")
    assert table.classes == ["0.5", "1"] and table.y.tolist() == [0, 1, 1]
    assert read_table(integers, "y", task="regression").y.tolist() == [[3.0], [4.0]]


@pytest.mark.parametrize(
    "content",
    [
        "a,b,c\n1,2,u\n3,4,v\n",
        "a;b;c\n1;2;u\n3;4;v\n",
        "a\tb\tc\n1\t2\tu\n3\t4\tv\n",
        "\ufeffa,b,c\r\n1,2,u\r\n3,4,v\r\n",
        "\n\na, b ,c\n\n 1 ,2 , u\n\n3,4, v \n\n",
        '"a","b","c"\n"1","2","u"\n"3","4","v"',
        "\ufeff\na;b;c\n+1.;2e0;u\n.3e1;4;v\n",
    ],
    ids=["comma", "semicolon", "tab", "excel", "blanks", "quotes", "numbers"],
)
def test_dialects(csv, content):
    table = read_table(csv(content), "c")
    assert table.columns == ["a", "b"] and table.x.tolist() == [[1, 2], [3, 4]] and table.classes == ["u", "v"]


def test_true_and_false_are_one_and_zero(csv):
    table = read_table(csv("a,b,y\nTrue,TRUE,u\nFalse, false ,v\n"), "y")
    assert table.x.tolist() == [[1, 1], [0, 0]]


def test_without_labels_the_target_is_not_looked_at(csv, npz):
    path = csv("a,b,y\n1,2,\n3,4,oak\n")
    table = read_table(path, columns=["a", "b"], labelled=False)
    assert table.x.tolist() == [[1, 2], [3, 4]] and table.y is table.task is table.classes is None
    table = read_table(npz(x=[[1], [2]], y=np.array([None, "oak", 3], object)), labelled=False)
    assert table.x.tolist() == [[1], [2]] and table.y is None
    with pytest.raises(ValueError, match="column 'y' is missing"):
        read_table(path, labelled=False)  # not known to be a target
    with pytest.raises(ValueError, match=r"'u', expected a finite number; encode it or remove the column$"):
        read_table(csv("a,y\n1,u\n2,v\n"), labelled=False)


def test_quoted_fields_keep_delimiters_and_quotes(csv):
    table = read_table(csv('"a;b,c","y"\n1,"u, ""v"""\n2,w\n'), "y")
    assert table.columns == ["a;b,c"] and table.classes == ['u, "v"', "w"]


def test_without_target_every_column_is_a_feature(csv):
    table = read_table(csv("a,b\n1,2\n"))
    assert table.columns == ["a", "b"] and table.y is table.task is table.classes is table.target is None


def test_a_models_columns_are_picked_by_name(csv):
    path = csv("note,b,y,a\nhello,2,v,1\n,4,u,3\n")
    table = read_table(path, "y", classes=["u", "v", "w"], columns=["a", "b"])
    assert table.x.tolist() == [[1, 2], [3, 4]] and table.columns == ["a", "b"]
    assert table.y.tolist() == [1, 0] and table.classes == ["u", "v", "w"]
    absent = read_table(csv("b,a\n2,1\n", "p.csv"), "y", classes=["u", "v"], columns=["a", "b"])
    assert absent.x.tolist() == [[1, 2]] and absent.y is None


def test_a_models_classes_number_the_labels(csv):
    path = csv("a,y\n1,2.0\n2,2\n3,02\n")
    table = read_table(path, "y", classes=["0", "1", "2"])
    assert table.y.tolist() == [2, 2, 2] and table.classes == ["0", "1", "2"]
    assert read_table(path, "y", classes=["02", "2", "2.0"]).y.tolist() == [
        2,
        1,
        0,
    ]  # the very text comes first


def test_seed_23_seven_points_ols(csv):
    points = np.column_stack([array.ravel() for array in datasets.regression7()])
    table = read_table(csv("x,y\n" + "\n".join(f"{x},{y}" for x, y in points.tolist())), "y")
    design = np.column_stack([table.x, np.ones(7)])
    (m, b), *_ = np.linalg.lstsq(design, table.y.ravel(), rcond=None)
    assert m == pytest.approx(0.335593220339, abs=1e-12)
    assert b == pytest.approx(0.804721549637, abs=1e-12)
    assert np.mean((design @ [m, b] - table.y.ravel()) ** 2) == pytest.approx(0.018051885161, abs=1e-12)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1))
def test_numbers_survive_exactly(csv, rows):
    table = read_table(csv("a,b,c\n" + "\n".join(",".join(map(repr, row)) for row in rows)))
    np.testing.assert_array_equal(table.x, rows)


# ---- good npz ----------------------------------------------------------------------------------------------


def test_npz_of_classes_of_numbers_and_of_nothing(npz):
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    table = read_table(npz(x=x, y=np.uint8([7, 3, 7])))
    assert table.x.dtype == np.float64 and (table.columns, table.target) == (None, None)
    assert (table.task, table.classes, table.y.tolist()) == ("classification", ["3", "7"], [1, 0, 1])

    assert read_table(npz(x=x, y=np.array(["b", "a", "b"]))).y.tolist() == [1, 0, 1]
    assert read_table(npz(x=x, y=np.array([b"b", b"a", b"b"]))).classes == ["a", "b"]
    assert read_table(npz(x=x, y=np.array([True, False, True]))).classes == ["False", "True"]
    assert read_table(npz(x=x, y=np.float32([1, 2, 1])), task="classification").classes == ["1", "2"]
    assert read_table(npz(x=x, y=np.float32([1, 2, 1])), classes=["1", "2", "3"]).y.tolist() == [0, 1, 0]

    table = read_table(npz(x=x, y=np.float32([0.5, 1, 2])))
    assert table.task == "regression" and table.y.tolist() == [[0.5], [1.0], [2.0]]
    assert read_table(npz(x=x, y=np.ones((3, 2)))).y.shape == (3, 2)
    assert read_table(npz(x=x, y=[1, 2, 3]), task="regression").y.shape == (3, 1)

    table = read_table(npz(x=x))
    assert table.y is table.task is table.classes is None
    assert read_table(npz(x=x, y=[0, 1, 0]), "species", columns=["a", "b"]).y.tolist() == [0, 1, 0]


# ---- faults of the file itself -----------------------------------------------------------------------------

BUNDLED = r"give a \.csv or \.npz file or a bundled set \(digits, regression7\)$"


def test_a_file_that_is_none(csv, tmp_path):
    for path, message in [
        (tmp_path / "missing.csv", "missing.csv: no such file; "),
        (tmp_path, ": is a directory, expected a file; "),
        (tmp_path / ("x" * 300 + ".csv"), r"x\.csv: cannot be read \(File name too long\); "),
        (csv("a\n1\n", "t.txt"), r"t\.txt: is of unknown kind '\.txt'; "),
        (csv("a\n1\n", "digit"), "digit: is of unknown kind ''; "),
        (csv("", "e.csv"), r"e\.csv: the file is empty; "),
        (csv("", "e.npz"), r"e\.npz: the file is empty; "),
    ]:
        with pytest.raises(ValueError, match=message + BUNDLED):
            read_table(path)


def test_names_of_files_may_be_text_and_in_capitals(csv):
    assert read_table(str(csv("a\n1\n", "T.CSV"))).x.tolist() == [[1]]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(csv):
    path = csv(IRIS)
    path.chmod(0)
    with pytest.raises(ValueError, match=r"cannot be read \(Permission denied\)"):
        read_table(path)


def test_unknown_task(csv):
    with pytest.raises(ValueError, match=r"^unknown task 'cluster'; choose from classification, regression$"):
        read_table(csv(IRIS), "species", task="cluster")


# ---- faults of a CSV ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kwargs", "message"),
    [
        ("a,b\n", {}, "has no rows under a header row, expected at least 1; add data$"),
        ("\n \n\n", {}, "has no rows under a header row"),
        ("a,a\n1,2\n", {}, "columns share the name a, expected distinct names; rename them$"),
        (",a\n0,1\n", {}, "column 1 has no name, expected one in the header; name or remove it$"),
        ("5.1,3.5\n4.9,3\n", {}, r"the first line is 5\.1, 3\.5, expected column names; add a header row$"),
        ("a,b\n1,2\n\n3\n", {}, "line 4 has 1 fields, expected 2 as in the header; add what it lacks or remove"),
        ("a,b\n1,2,3\n", {}, "line 2 has 3 fields, expected 2 .*; quote a field that holds the delimiter or remove"),
        ('a,b\n1,2\n3,"4\n5,6\n', {}, r"line 3 cannot be read \(unexpected end of data\); check its quotes$"),
        (b"a,b\n\xff\xfe,2\n", {}, r"is not UTF-8 text \(invalid start byte\); convert it to UTF-8$"),
        ("a,b\n1,2\n".encode("utf-16"), {}, "is not UTF-8 text"),
        (IRIS, {"target": "kind"}, "has no column 'kind' for the target; choose from length, width, sp"),
        (IRIS, {}, "line 2, column 'species' has 'setosa', .* or use --target species$"),
        ("y\nu\nv\n", {"target": "y"}, "has no column but the target 'y', expected features; add some$"),
        ("a,b\n1,2\n3,4x\n", {}, "line 3, column 'b' has '4x', expected a finite number; fix it, remove"),
        ("a,b\n1,2\n\n3,4x\n", {}, "line 4, column 'b' has '4x'"),
        ("a,b,y\n1,u,2\n2,v,3\n", {"target": "y"}, "line 2, column 'b' has 'u', .*; encode it or remove the column$"),
        ("a,b,y\n1,2,2\n2,v,3\n", {"target": "y"}, "line 3, column 'b' has 'v', .*; fix it or remove the column$"),
        ("a\nTrue\n1\n", {}, "line 2, column 'a' has 'True', expected a finite number"),
        ('a,n,b\n1,"2",3\n1,2,"x\ny"\n1,2,y', {}, r"line 3, column 'b' has 'x\\ny'"),
        ("a\n1\n1_000\n", {}, "line 3, column 'a' has '1_000', expected a finite number"),
        ("a\n1\ninf\n", {}, "line 3, column 'a' has 'inf', expected a finite number"),
        ("a\n1\n1e999\n", {}, "line 3, column 'a' has '1e999', expected a finite number"),
        ("a;b\n1;2\n3;4,5\n", {}, "line 3, column 'b' has '4,5', .*; write it with a decimal point$"),
        ("a,b\n1,\n", {}, r"line 2, column 'b' is missing \(''\), expected a value; fill or remove"),
        ("a,b\n1,NA\n", {}, r"line 2, column 'b' is missing \('NA'\)"),
        ("a,b\n1,2\n1, nan \n", {}, r"line 3, column 'b' is missing \('nan '\)"),
        ("a,y\n1,u\n2,\n", {"target": "y"}, r"line 3, column 'y' is missing \(''\)"),
        ("a,y\n1,0.5\n2,\n", {"target": "y"}, r"line 3, column 'y' is missing \(''\)"),
        ("a,y\n1,u\n2,u\n", {"target": "y"}, "every row has the class 'u', expected at least 2 classes; add"),
        ("a,y\n1,0.5\n2,1,5\n", {"target": "y"}, "line 3 has 3 fields"),
        ("a,y\n1,0.5\n2,o.7\n", {"target": "y"}, r"line 3, column 'y' has 'o\.7' among fractions; fix it or"),
        ("a,y\n1,0.5\n2,inf\n", {"target": "y"}, "line 3, column 'y' has 'inf' among fractions"),
        ("a,y\n1,2\n2,u\n", {"target": "y", "task": "regression"}, "line 3, .* or use --task class"),
        (IRIS, {"columns": ["width", "depth", "age"]}, "lacks the model's columns depth, age; it has length"),
        (IRIS, {"target": "species", "classes": ["setosa", "virginica"]},
         "line 3, column 'species' has the unknown class 'versicolor'; the model knows setosa, virginica$"),
    ],
)  # fmt: skip
def test_faults_of_a_csv(csv, content, kwargs, message):
    with pytest.raises(ValueError, match=r"t\.csv: " + message) as caught:
        read_table(csv(content), **kwargs)
    assert "\n" not in str(caught.value)


def test_long_lists_of_names_are_cut(csv):
    header = ",".join(f"c{i}" for i in range(200))
    with pytest.raises(ValueError, match=r"choose from c0, c1, .*, c9 and 190 more$"):
        read_table(csv(header + "\n" + "1," * 199 + "1\n"), "y")


# ---- faults of an npz --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "kwargs", "message"),
    [
        ({"y": [1]}, {}, r"has the arrays y, expected x and y; write it with np\.savez\(path, x=x, y=y\)$"),
        ({"x": np.ones((3, 8, 8))}, {}, r"x has shape \(3, 8, 8\), expected rows and columns; use x\.resh"),
        ({"x": [[1, np.nan]]}, {}, "x has a NaN at row 0, column 1; remove or fill such rows$"),
        ({"x": np.ones((0, 3))}, {}, "x has 0 rows"),
        ({"x": [["a"]]}, {}, "x has dtype <U1"),
        ({"x": [[1], [2]], "y": [1]}, {}, "x has 2 rows but y has 1"),
        ({"x": [[1], [2]], "y": [[1], [2]]}, {}, r"y has shape \(2, 1\), expected \(2,\), one label each;"),
        ({"x": [[1], [2]], "y": [1.0, np.inf]}, {}, "y has an infinity at row 1"),
        ({"x": [[1], [2]], "y": ["a", "b"]}, {"task": "regression"}, "y has dtype <U1, expected numbers"),
        ({"x": [[1], [2]], "y": [1j, 2]}, {}, "y has dtype complex128"),
        ({"x": [[1], [2]], "y": ["a", ""]}, {}, r"y at row 1 is missing \(''\)"),
        ({"x": [[1], [2]], "y": [4, 4]}, {}, "every row has the class '4', expected at least 2 classes"),
        ({"x": [[1], [2]], "y": [0, 9]}, {"classes": ["0", "1"]}, "y at row 1 has the unknown class '9'"),
        ({"x": [[1], [2]], "y": [0, 1]}, {"target": "y"}, "target 'y' was given, but .* npz is its array y"),
        ({"x": [[1], [2]]}, {"columns": ["a", "b"]}, "x has 1 columns but the model expects 2$"),
        ({"x": np.array([[1, "a"]], object)}, {}, "cannot be read as npz .*Object arrays cannot be loaded"),
    ],
)  # fmt: skip
def test_faults_of_an_npz(npz, arrays, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=r"t\.npz: " + message):
        read_table(npz(**arrays), **kwargs)


def test_an_npz_that_is_no_zip(csv):
    for content in (b"x,y\n1,2\n", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."):
        with pytest.raises(ValueError, match=r"t\.npz: cannot be read as npz \(it is no zip archive, or cut short\)"):
            read_table(csv(content, "t.npz"))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_always_one_line(csv, data):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(12.0).reshape(6, 2), y=np.arange(6) % 2)
    content = bytearray(buffer.getvalue())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[position] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(1, len(content)))
    for name in ("t.npz", "t.csv"):
        try:
            read_table(csv(bytes(content[:cut]), name), "y" if name == "t.csv" else None)
        except (ValueError, TypeError) as error:
            assert "\n" not in str(error) and name in str(error)
