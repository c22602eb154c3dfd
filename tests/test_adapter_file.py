"""Adapter folders from strangers: whatever is wrong with them is a typed error, at once, with nothing loaded."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import time
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import ranktune
from ranktune.adapter_file import read_adapter
from ranktune.errors import AdapterFileError, ConfigError
from tests.methods import ROWS, TARGETS, build_base, inputs, perturb
from tests.test_export import adapted

pytestmark = pytest.mark.filterwarnings("ignore:adapter .* is being trained without a controller")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Cases of each kind of damage; they are drawn anew from the seed, always the same.
TRUNCATIONS, FLIPS, CONFIG_EDITS, HEADER_EDITS = 60, 240, 160, 160
SECONDS = 1.0


@pytest.fixture(scope="module", params=["increlora", "dylora", "mor", "stock"])
def folder(request, tmp_path_factory):
    """A good adapter folder."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "stock":
        config = peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True, rank_pattern={"wide": 3})
        peft.get_peft_model(build_base("Linear"), config).save_pretrained(path)
    else:
        adapted(next(row for row in ROWS if row.name == request.param)).save_pretrained(path)
    ranktune.inspect(path)
    return path


def damaged(folder, tmp_path, config=None, tensors=None):
    """A copy with one of its files replaced."""
    copy = tmp_path / "damaged"
    copy.mkdir(exist_ok=True)
    (copy / CONFIG).write_bytes((folder / CONFIG).read_bytes() if config is None else config)
    (copy / TENSORS).write_bytes((folder / TENSORS).read_bytes() if tensors is None else tensors)
    return copy


def survives(path):
    """Whether it was read; if not, it was refused as it should be."""
    began, refusal = time.process_time(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown fields of a newer version
            ranktune.inspect(path)
    except AdapterFileError as error:
        refusal = str(error)
    assert time.process_time() - began < SECONDS
    assert refusal is None or (str(path) in refusal and len(refusal) < 2000)
    return refusal is None


def test_truncations(folder, tmp_path):
    """A file cut anywhere is refused: none of its bytes is dispensable."""
    draw = random.Random(0)
    for name in (CONFIG, TENSORS):
        content = (folder / name).read_bytes()
        for length in {0, 1, 7, 8, 9, len(content) - 1, *draw.choices(range(len(content)), k=TRUNCATIONS // 2)}:
            files = {"config" if name == CONFIG else "tensors": content[:length]}
            assert not survives(damaged(folder, tmp_path, **files)), (name, length)


def test_trailing_bytes_are_refused(folder, tmp_path):
    content = (folder / TENSORS).read_bytes()
    assert not survives(damaged(folder, tmp_path, tensors=content + b"\0"))


def test_bit_flips(folder, tmp_path):
    """A flipped bit is refused, or is a number that changed."""
    draw = random.Random(1)
    survived = 0
    for name in (CONFIG, TENSORS):
        content = (folder / name).read_bytes()
        header = 8 + struct.unpack("<Q", content[:8])[0] if name == TENSORS else len(content)
        for _ in range(FLIPS // 2):
            flipped = bytearray(content)
            flipped[draw.randrange(header if draw.random() < 0.8 else len(content))] ^= 1 << draw.randrange(8)
            files = {"config" if name == CONFIG else "tensors": bytes(flipped)}
            survived += survives(damaged(folder, tmp_path, **files))
    assert survived < FLIPS * 0.6


ODD = [
    None,
    True,
    -1,
    0,
    1e308,
    1 << 70,
    0.5,
    "",
    "x" * 100,
    "\0",
    "../../etc/passwd",
    [],
    {},
    [[]],
    {"a": {"b": []}},
    [1],
]


def test_hostile_configs(folder, tmp_path):
    """Every field replaced by values of every kind."""
    draw = random.Random(2)
    good = json.loads((folder / CONFIG).read_text())
    for _ in range(CONFIG_EDITS):
        bad = {**good, draw.choice(list(good)): draw.choice(ODD)}
        survives(damaged(folder, tmp_path, config=json.dumps(bad).encode()))


def test_hostile_headers(folder, tmp_path):
    """Shapes, types, places and names replaced in a header that is valid JSON of the right length."""
    draw = random.Random(3)
    content = (folder / TENSORS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for _ in range(HEADER_EDITS):
        name, part = draw.choice(names), draw.choice(["dtype", "shape", "data_offsets", "name", "entry", "metadata"])
        bad = json.loads(json.dumps(header))
        if part == "name":
            bad[draw.choice(["../../evil", "a/b", "", "x" * 600, "lora_A", name + "\n", "..", "a..b"])] = bad.pop(name)
        elif part == "metadata":
            bad["__metadata__"] = draw.choice([[], 3, {"format": 1}, {"format": {}}])
        elif part == "entry":
            bad[name] = draw.choice(ODD)
        else:
            odd = [*ODD, "F4", "F64", [1 << 40, 1 << 40], [-1, 4], [0], [0, 1 << 62], [8, 0], [2.0, 2], [True, 1]]
            bad[name][part] = draw.choice(odd)
        text = json.dumps(bad).encode()
        # An odd rewrite may be the same file: then it must still be read.
        same = bad == header
        assert (
            survives(damaged(folder, tmp_path, tensors=struct.pack("<Q", len(text)) + text + content[8 + length :]))
            == same
        )


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (struct.pack("<Q", 1 << 62) + b"{}", "announces a header of"),
        (struct.pack("<Q", 40 << 20) + b" " * 64, "announces a header of"),
        (struct.pack("<Q", 2) + b"[]", "where a JSON object belongs"),
        (
            struct.pack("<Q", 60_000) + b"[" * 60_000,
            "has a header that is no valid JSON .*: it is truncated or altered, or no safetensors file",
        ),
        (struct.pack("<Q", 15) + b'{"a":1,"a":[1]}', "appears twice"),
        (struct.pack("<Q", 9) + b'{"a":NaN}', "is no number"),
        (
            struct.pack("<Q", 3) + b"\xff\xfe{",
            "has a header that is no valid JSON .*: it is truncated or altered, or no safetensors file",
        ),
    ],
)
def test_headers_by_hand(folder, tmp_path, tensors, reason):
    with pytest.raises(AdapterFileError, match=reason):
        read_adapter(damaged(folder, tmp_path, tensors=tensors))


def header_of(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        # A file of a hundred bytes that asks for a terabyte.
        ({"a": {"dtype": "F32", "shape": [1 << 19, 1 << 19], "data_offsets": [0, 1 << 40]}}, 8, "torn"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4, "needs 8"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "where the one before it ends at 0"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            12,
            "ends at 8",
        ),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 12, "something hidden"),
        ({"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}, 4, "impossible shape"),
        ({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, 8, "unknown type"),
        ({"../a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 4, "no module's name"),
    ],
)
def test_layouts_by_hand(folder, tmp_path, header, data, reason):
    with pytest.raises(AdapterFileError, match=reason):
        read_adapter(damaged(folder, tmp_path, tensors=header_of(**header) + b"\0" * data))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": None}, "peft_type=None"),
        ({"r": "8"}, "r='8'"),
        ({"r": 1 << 20}, "whole number from 1 to 65536"),
        ({"lora_alpha": True}, "lora_alpha=True"),
        ({"rank_pattern": {"wide": -3}}, r"rank_pattern\['wide'\]=-3"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"target_modules": [1]}, "target_modules"),
        ({"base_model_name_or_path": "a\0b"}, "base_model_name_or_path"),
    ],
)
def test_configs_by_hand(folder, tmp_path, change, reason):
    config = {**json.loads((folder / CONFIG).read_text()), **change}
    with pytest.raises(AdapterFileError, match=reason):
        read_adapter(damaged(folder, tmp_path, config=json.dumps(config).encode()))


@pytest.mark.parametrize("key", ["(.*)*x", "(a+)+$" * 3, ".*.*.*.*y", "(?:[a-z]+)*(?:[a-z]+)*!", "(", "x" * 10_000])
def test_patterns_that_would_take_for_ever(tmp_path, key):
    """In stock PEFT these keys are regular expressions, which it tries on every module."""
    config = peft.LoraConfig(r=2, target_modules=TARGETS)
    peft.get_peft_model(build_base("Linear"), config).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**fields, "alpha_pattern": {key: 3}}))
    survives(tmp_path)


class Bomb:
    """What a pickle can do: leave a file where it was read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "anything.pkl"])
@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_pickles_are_refused_unread(tmp_path, name, kind):
    path = tmp_path / "adapter"
    config = ROWS[0].config(target_modules=TARGETS) if kind == "ours" else peft.LoraConfig(target_modules=TARGETS)
    peft.get_peft_model(build_base("Linear"), config).save_pretrained(path)
    (path / TENSORS).unlink()
    (path / name).write_bytes(pickle.dumps({"a": Bomb(tmp_path / "exploded")}))
    with pytest.raises(AdapterFileError, match=f"{name} is a pickle"):
        ranktune.inspect(path)
    if kind == "ours":
        with pytest.raises(AdapterFileError, match=f"{name} is a pickle"):
            peft.PeftModel.from_pretrained(build_base("Linear"), str(path))
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_under_the_safe_name(folder, tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    for content in (buffer.getvalue(), pickle.dumps(Bomb(tmp_path / "exploded"))):
        with pytest.raises(AdapterFileError, match="safetensors"):
            read_adapter(damaged(folder, tmp_path, tensors=content))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_links_that_leave_the_folder(folder, tmp_path, name):
    copy = damaged(folder, tmp_path)
    outside = tmp_path / "outside"
    (copy / name).rename(outside)
    (copy / name).symlink_to(outside)
    with pytest.raises(AdapterFileError, match="is a link that leaves the folder"):
        read_adapter(copy)


def test_the_links_of_a_hub_cache_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG, TENSORS):
        (blobs / f"hash-{name}").write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    assert survives(snapshot)


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "weird" / TENSORS).mkdir(parents=True)
    (tmp_path / "weird" / CONFIG).write_text('{"peft_type": "LORA"}')
    for path, reason in (("none", "does not exist"), ("file", "is a file"), ("weird", "not a regular file")):
        with pytest.raises(AdapterFileError, match=reason):
            read_adapter(tmp_path / path)
    with pytest.raises(AdapterFileError, match=r"adapter_config.json does not exist"):
        read_adapter(tmp_path)


def edited(folder, tmp_path, change):
    """A copy whose tensors went through a function."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    copy = tmp_path / "damaged"
    copy.mkdir(exist_ok=True)
    (copy / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    save_file(tensors, copy / TENSORS)
    return copy


def first(tensors, part):
    return next(name for name in tensors if part in name and "wide" in name)


EDITS = {
    "a factor is missing": (lambda t: t.pop(first(t, "lora_B")), "lacks"),
    "another width": (
        lambda t: t.update({first(t, "lora_A"): torch.zeros(7, 99)}),
        "belongs|rows in lora_A|components",
    ),
    "another rank in B": (lambda t: t.update({first(t, "lora_B"): torch.zeros(20, 1)}), "belongs|rows in lora_A"),
    "integers": (lambda t: t.update({first(t, "lora_B"): t[first(t, "lora_B")].int()}), "of type I32"),
    "not a number": (lambda t: t[first(t, "lora_B")].fill_(float("nan")), "NaN or infinity"),
    "a vector": (lambda t: t.update({first(t, "lora_A"): torch.zeros(3)}), "lacks lora_A|two dimensions|belongs"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_tensors_that_do_not_fit_each_other(folder, tmp_path, edit):
    change, reason = EDITS[edit]
    with pytest.raises(AdapterFileError, match=reason):
        ranktune.inspect(edited(folder, tmp_path, change))


@pytest.mark.parametrize("part", ["lora_A", "gate", "rank_active", "rank_average"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_loading_is_all_or_nothing(tmp_path, part, low_memory):
    """One module's tensor is missing or misshapen: no tensor of any module is loaded."""
    row = next(row for row in ROWS if row.name == "dynamic-dora")
    other = perturb(peft.get_peft_model(build_base("Linear"), row.config(target_modules=TARGETS)), seed=9)
    other.save_pretrained(tmp_path / "good")
    model = adapted(row).eval()
    expected = model(inputs())
    for number, change in enumerate(
        (lambda t: t.pop(first(t, part)), lambda t: t.update({first(t, part): torch.ones(5)}))
    ):
        bad = edited(tmp_path / "good", tmp_path, change)
        with pytest.raises(AdapterFileError, match=r"module .*wide of the saved adapter (lacks|has)"):
            model.load_adapter(str(bad), "default", low_cpu_mem_usage=low_memory)
        assert torch.equal(model(inputs()), expected)
        with pytest.raises(AdapterFileError, match="Nothing was loaded"):
            model.load_adapter(str(bad), f"other{number}")
    assert model.active_adapters == ["default"]


def test_peft_reads_torn_files_of_ours_no_further_than_their_header(tmp_path):
    adapted(ROWS[0]).save_pretrained(tmp_path)
    content = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(content[:-1])
    with pytest.raises(AdapterFileError, match="torn"):
        peft.PeftModel.from_pretrained(build_base("Linear"), str(tmp_path))
    with pytest.raises(ConfigError):
        peft.PeftConfig.from_pretrained(str(damaged_method(tmp_path, content)))


def damaged_method(path, content):
    (path / TENSORS).write_bytes(content)
    fields = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**fields, "method": "dorra"}))
    return path
