"""``model_config.yaml``: bombs, tags, resolvers, and configurations that say impossible things."""

from __future__ import annotations

import copy
import itertools
import json
import random
from typing import Any

from tests.fuzz.cases import any_seed, category
from tests.fuzz.seeds import CONFIG

SAME_HASH = 2**61 - 1  # integers that differ by this share a hash
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 255, 2**31, 2**31 - 1, 2**63, 2**64, 10**18, 10**100, -(2**63)),
    *(0.0, -1.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"), 0.5),
    *(
        "",
        "x",
        "x" * 1000,
        "../../evil",
        "/etc/passwd",
        "nemo:",
        "nemo:../evil",
        "nemo:/etc/passwd",
        "nemo:model_weights.ckpt",
    ),
    *(
        "nemo:model_config.yaml",
        "${oc.env:HOME}",
        "${target}",
        "${.}",
        "???",
        "\u0000",
        "\ud83d\ude00",
        "None",
        "gelu",
        "os.system",
    ),
    *(
        [],
        {},
        [None],
        [1, 2, 3],
        {"a": {"b": 1}},
        [[[]]],
        [1e308] * 3,
        ["a"] * 3,
        {"auto_map": {"AutoModel": "evil.Model"}},
    ),
]


def _leaves(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of every key and item, inner ones too."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    paths = []
    for key, value in inner:
        paths += [(*at, key), *_leaves(value, (*at, key))]
    return paths


def _set(config: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


@category("configuration", hostile=True, weight=20)
def yaml_bombs(drawn: random.Random) -> bytes:
    """What takes time or memory: aliases that multiply, depth, numbers in base 60, keys with one hash, sheer length."""
    names = "abcdefghi"
    lol = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise(names)
    )
    n = drawn.choice((500, 5000, 20_000))
    texts = [
        lol,
        "a: &a [*a]\n",
        "x: &x {y: *x}\n",
        "a: " + "[" * n + "]" * n,
        "[" * n,
        "a: " + "{b: " * n + "}" * n,
        "".join(" " * level + "k:\n" for level in range(600)),
        "- " * n,
        "? " * n,
        "a: " + "!" * n,
        "a: |\n" + " \n" * n + " x\n" + "b: " + "[" * 100,
        "".join(f"{number * SAME_HASH}: 1\n" for number in range(1, min(n, 10_000))),
        "? [a, b]\n: 1\n",
        "? {a: b}\n: 1\n",
        "a: 1\n" * 2,
        "".join(f"k{number}: {number}\n" for number in range(40_000)),
        "- a\n" * 60_000,
        "a: " + "x" * (1 << 20),
        "a: '" + "''" * 60_000,
        'a: "' + "\\x41" * 50_000,
        "a: b\n---\na: c\n",
        "%TAG ! tag:evil,2000:\n---\na: !x b\n",
        "%YAML 9.9\n---\na: b\n--- \n",
        "a: b\n...\n%FOO\n---\nc: d\n",
        "<<: {a: 1}\ntarget: x\n<<: {b: 2}\n",
        "a: >-\n" + "  x\n\n" * 20_000 + "b: *y",
        "# " + "c" * 200_000 + "\n[",
        "\ufeff[",
        "a:\tb: c: d\n",
    ]
    return any_seed(drawn).with_content(CONFIG, drawn.choice(texts).encode()).pack()


@category("configuration", hostile=True, weight=20)
def yaml_tags(drawn: random.Random) -> bytes:
    tag = drawn.choice(
        (
            "!!python/object/apply:os.system ['touch canary']",
            "!!python/object/apply:subprocess.Popen [[touch, canary]]",
            "!!python/object/new:os.system [touch canary]",
            "!!python/name:os.system",
            "!!python/module:canary",
            "!!python/object:canary.Canary {}",
            '!!python/object/apply:builtins.eval [\'open("canary", "w")\']',
            "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch canary']",
            "!!binary aGVsbG8=",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "!!timestamp 2000-01-01",
            "!!str x",
            "!Ref x",
            "!include /etc/passwd",
            "!!python/tuple [1, 2]",
            "!!merge x",
        )
    )
    seed = any_seed(drawn)
    text = seed.content(CONFIG).decode()
    lines = text.splitlines()
    lines.insert(drawn.choice((0, len(lines))), f"{drawn.choice(('evil', 'zz'))}: {tag}")
    return seed.with_content(CONFIG, "\n".join(lines).encode()).pack()


@category("configuration", hostile=False, weight=20)
def resolvers(drawn: random.Random) -> bytes:
    """OmegaConf's interpolations: nothing is resolved but whole-value references, and those not in circles."""
    seed = any_seed(drawn)
    config = seed.config
    n = drawn.choice((10, 1000, 10_000))
    evil = drawn.choice(
        (
            "${oc.env:HOME}",
            "${oc.decode:${oc.env:HOME}}",
            "${oc.create:{a: 1}}",
            "${oc.dict.values:clip}",
            "${oc.select:target}",
            "${eval:__import__('os').system('touch canary')}",
            "${evil}",
            "${.evil}",
            "${..target}",
            "${" * n,
            "${a" * n + "}" * n,
            "${a:" * n + "}" * n,
            "${target}" * n,
            "\\" * n + "${x}",
            "${oc.env:'" + "[{" * n,
            "${clip.text_config}",
            "${" + ".".join(["a"] * n) + "}",
            "${" + "." * n + "a}",
            "${a-" + "-" * n + "!}",
        )
    )
    paths = _leaves(config)
    for path in drawn.sample(paths, drawn.choice((1, 2, len(paths)))):
        try:
            _set(config, path, evil)
        except (KeyError, TypeError, IndexError):
            continue  # an outer key was replaced before
    config["evil"] = "${chain0}"
    for number in range(100):
        config[f"chain{number}"] = f"${{chain{number + 1}}}"
    if drawn.random() < 0.5:
        config["chain100"] = "${evil}"
    return seed.with_config(config).pack()


@category("configuration", hostile=False, weight=60)
def odd_values(drawn: random.Random) -> bytes:
    """One to three fields with a value of another type, size or sign."""
    seed = any_seed(drawn)
    config = copy.deepcopy(seed.config)
    for _ in range(drawn.choice((1, 1, 1, 2, 3))):
        _set(config, drawn.choice(_leaves(config)), copy.deepcopy(drawn.choice(ODD_VALUES)))
    return seed.with_config(config).pack()


@category("configuration", hostile=False, weight=20)
def lost_and_found_fields(drawn: random.Random) -> bytes:
    """A field removed, renamed, or one that other libraries act on added."""
    seed = any_seed(drawn)
    config = seed.config
    path = drawn.choice(_leaves(config))
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    value = parent.pop(path[-1])
    extra = drawn.choice(
        (
            {"auto_map": {"AutoModel": "evil--model.Model"}, "trust_remote_code": True},
            {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"},
            {"quantization_config": {"quant_method": "bitsandbytes"}, "torch_dtype": "evil", "dtype": "evil"},
            {"model_type": "evil", "_name_or_path": "../evil", "architectures": ["Evil"]},
            {
                "__class__": "evil",
                "__dict__": {},
                "__reduce__": "os.system",
                "_target_": "os.system",
                "_args_": ["touch canary"],
            },
            {"nemo_version": "9.9", "library": "evil", "model": "/etc/passwd", "tokenizer": {"type": "evil/evil"}},
        )
    )
    if isinstance(parent, dict):
        parent |= drawn.choice((extra, {f"{path[-1]}x": value}, {}))
    return seed.with_config(config).pack()


@category("configuration", hostile=True, weight=10)
def foreign_targets(drawn: random.Random) -> bytes:
    seed = any_seed(drawn)
    target = drawn.choice(
        (
            *(
                "os.system",
                "builtins.eval",
                "canary.Canary",
                "nemo.collections.asr.models.EncDecCTCModel",
                "",
                "..",
                "a:b",
            ),
            *(
                "nemo_aligner_diffusion.rewards.clip.CLIPReward.__init__",
                "nemo_aligner_diffusion.rewards.custom.CustomReward",
            ),
            *(
                "evil.MegatronCLIPModel",
                "nemo.x.MegatronCLIPModel.evil",
                "nemo_evil.MegatronCLIPRewardModel",
                "x" * 60_000,
            ),
            *(
                None,
                3,
                ["nemo.MegatronCLIPModel"],
                {"a": 1},
                True,
                "nemo_aligner_diffusion.rewards.clip.CLIPReward\n",
            ),
        )
    )
    return seed.with_config({**seed.config, "target": target}).pack()


@category("configuration", hostile=False, weight=20)
def damaged_text(drawn: random.Random) -> bytes:
    """Bytes of the YAML changed, in an archive that is otherwise whole."""
    seed = any_seed(drawn)
    text = bytearray(seed.content(CONFIG))
    for _ in range(drawn.choice((1, 2, 20))):
        at = drawn.randrange(len(text))
        text[at : at + drawn.randrange(3)] = drawn.choice(
            (
                b"",
                b"\n",
                b"\t",
                b": ",
                b"- ",
                b"'",
                b'"',
                b"{",
                b"]",
                b"&a ",
                b"*a",
                b"!",
                b"|\n",
                b"%",
                b"\xff",
                b"\0",
                b"9999999999",
                b"-",
            )
        )
    return seed.with_content(CONFIG, bytes(text)).pack()


@category("configuration", hostile=False, weight=10)
def tokenizer_by_name(drawn: random.Random) -> bytes:
    """A tokenizer that is only named: nothing is loaded from where the name may point."""
    seed = any_seed(drawn)
    name = drawn.choice(
        (
            "../evil",
            "evil/../evil",
            "/etc/passwd",
            "evil/tokenizer",
            "file:///etc/passwd",
            "http://127.0.0.1:9/x",
            "a/b/c",
            "~/x",
            "a/b\n",
            ".",
            "openai/" + "x" * 5000,
        )
    )
    config = {**seed.config, "tokenizer": {"type": name, "library": "huggingface", "model": name, "vocab_file": None}}
    return seed.with_config(config).pack()


@category("tokenizer", hostile=False, weight=40)
def tokenizer_files(drawn: random.Random) -> bytes:
    """Vocabularies and merges that are damaged, enormous, nested, or of other types. No digest stands in the way."""
    seed = any_seed(drawn)
    config = {**seed.config, "nemo_version": "2.0.0"}
    artifacts = [name for name, _ in seed.members if "vocab" in name or "merges" in name]
    if not artifacts:
        return damaged_text(drawn)
    name = drawn.choice(artifacts).rpartition("/")[2]
    content = seed.content(name)
    n = drawn.choice((100, 10_000, 200_000))
    way = drawn.randrange(10)
    if way == 0:
        content = content[: drawn.randrange(len(content))]
    elif way == 1:
        changed = bytearray(content)
        for _ in range(drawn.choice((1, 5, 50))):
            changed[drawn.randrange(len(changed))] = drawn.randrange(256)
        content = bytes(changed)
    elif way == 2:
        content = drawn.choice(
            (b"[" * n, b'{"a":' * n, b"{}", b"[]", b"null", b"1", b'"x"', b"", b"\xff\xfe", b"NaN", b"[1e999]")
        )
    elif way == 3:
        known = json.loads(content) if "vocab.json" in name else {}
        more = {f"w{number}": len(known) + number for number in range(drawn.choice((n, 300_000)))}
        content = json.dumps(known | more, separators=(",", ":")).encode()
    elif way == 4:
        content = b'{"a": ' + b"9" * n + b"}"
    elif way == 5 and "vocab.json" in name:
        vocabulary = json.loads(content)
        key = drawn.choice(list(vocabulary))
        vocabulary[key] = drawn.choice((-1, 2**31, 2**31 - 1, 10**30, 0, 1.5, "x", None, True, [], vocabulary[key] + 1))
        content = json.dumps(vocabulary).encode()
    elif way == 6:
        content = (
            b"#version: 0.2\n" + drawn.choice((b"a b\n", b"a\n", b"a b c\n", b"\n", b" \n", b"r e\n", b"\xff e\n")) * n
        )
    elif way == 7:
        content = b"x" * drawn.choice((1 << 20, 8 << 20))
    elif way == 8:
        content = json.dumps({"k" * 1000 + str(number): number for number in range(min(n, 5000))}).encode()
    else:
        content = drawn.randbytes(drawn.choice((10, 10_000)))
    return seed.with_config(config).with_content(name, content).pack()
