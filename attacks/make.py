#!/usr/bin/env python3
"""Writes hostile files: chat templates, tokenizers, profiles, plans, configurations, GGUF and safetensors headers.

make.py MODEL OUT: MODEL is a good model folder (assets/moa-tiny) that the hostile ones are made from.
"""
import json, os, shutil, struct, sys

model, out = sys.argv[1:]
os.makedirs(out, exist_ok=True)


def write(name, data):
    with open(os.path.join(out, name), "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())


# Templates: a program by a stranger.
twice = "{% set x = ['a'] %}" + "{% set x = [x, x] %}" * 60
many = 120_000
templates = {
    "twice-printed": twice + "{{ x }}",
    "twice-with": "{% set x = ['a'] %}" + "{% with x = x + x %}" * 60 + "{{ x }}" + "{% endwith %}" * 60,
    "twice-macro": "{% macro f(x, n) %}{% if n %}{{ f(x + x, n - 1) }}{% else %}{{ x }}{% endif %}{% endmacro %}{{ f(['a'], 60) }}",
    "twice-compared": twice.replace("set x = ['a']", "set x = ['a'] %}{% set y = ['a']")
    + "{% set y = ['a'] %}" + "{% set y = [y, y] %}" * 60 + "{{ x == y }}",
    "twice-less": twice + "{% set y = [x, x] %}{{ x < y }}",
    "twice-in": twice + "{{ x in [x, [x, 1]] }}",
    "twice-tojson": twice + "{{ x | tojson }}",
    "twice-tojson-indent": twice + "{{ x | tojson(indent=64) }}",
    "twice-sorted": twice + "{{ [x, x, x] | sort }}",
    "twice-unique": twice + "{{ [x, [x]] | unique }}",
    "twice-string": twice + "{{ x | string | length }}",
    "twice-pprint": twice + "{{ x | pprint }}",
    "twice-join": twice + "{{ [x, x] | join(',') }}",
    "twice-format": twice + "{{ '%s' % x }}",
    "twice-tilde": twice + "{{ x ~ x }}",
    "twice-key": twice + "{% set y = {x: 1} %}{{ y }}",
    "twice-urlencode": twice + "{{ {'a': x} | urlencode }}",
    "twice-map": "{% set x = {'a': 1} %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x }}{{ x == x }}",
    "long-join": "{{ range(100000) | join('" + "x" * 60_000 + "') }}",
    "long-repeat": "{{ 'x' * 2000000000 }}",
    "long-list": "{{ [1] * 2000000000 }}",
    "long-pad": "{{ 'x'.ljust(2000000000) }}",
    "long-zfill": "{{ 'x'.zfill(2000000000) }}",
    "long-center": "{{ 'x' | center(2000000000) }}",
    "long-indent": "{{ 'x\\ny' | indent(2000000000) }}",
    "long-format": "{{ '%2000000000s' % 'x' }}",
    "long-format-digits": "{{ '%.2000000000f' % 1.5 }}",
    "long-replace": "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "long-double": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "long-round": "{{ 1.5 | round(2000000000) }}",
    "long-power": "{{ 2 ** 1000000000 }}",
    "long-batch": "{{ range(10) | batch(2000000000, 'x') | list }}",
    "long-slice": "{{ range(10) | slice(2000000000) | list }}",
    "long-tabs": "{{ '\\t' .expandtabs(2000000000) }}",
    "long-loop": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "deep-not": "{{ " + "not " * (many // 4) + "1 }}",
    "deep-minus": "{{ " + "-" * many + "1 }}",
    "deep-parens": "{{ " + "(" * many + "1" + ")" * many + " }}",
    "deep-lists": "{{ " + "[" * many + "]" * many + " }}",
    "deep-plus": "{{ 1" + "+1" * (many // 2) + " }}",
    "deep-filters": "{{ 'x'" + "|trim" * (many // 5) + " }}",
    "deep-attributes": "{{ x" + ".a" * (many // 2) + " }}",
    "deep-items": "{{ x" + "[0]" * (many // 3) + " }}",
    "deep-calls": "{{ x" + "()" * (many // 2) + " }}",
    "deep-and": "{{ 1" + " and 1" * (many // 6) + " }}",
    "deep-else": "{{ " + "1 if 0 else " * (many // 12) + "1 }}",
    "deep-elif": "{% if 0 %}" + "{% elif 0 %}" * (many // 12) + "{% endif %}",
    "deep-if": "{% if 1 %}" * (many // 22) + "{% endif %}" * (many // 22),
    "deep-for": "{% for i in [1] %}" * (many // 32) + "{% endfor %}" * (many // 32),
    "deep-tilde": "{{ 1" + "~1" * (many // 2) + " }}",
    "deep-compare": "{{ 1" + "==1" * (many // 3) + " }}",
    "deep-tests": "{{ 1" + " is defined" * (many // 11) + " }}",
    "deep-recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "deep-loop-recursion": "{% for i in [[1]] recursive %}{{ loop([i]) }}{% endfor %}",
    "deep-drop": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}done",
    "deep-drop-map": "{% set ns = namespace(x={}) %}{% for i in range(99999) %}{% set ns.x = {'a': ns.x} %}{% endfor %}done",
    "deep-drop-loops": "{% set ns = namespace(x=[]) %}" + "{% for a in range(99999) %}{% for b in range(99) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}done",
    "deep-drop-printed": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "deep-drop-compared": "{% set ns = namespace(x=[], y=[]) %}{% for i in range(49999) %}{% set ns.x = [ns.x] %}{% set ns.y = [ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "deep-drop-tojson": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "self-namespace": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}{{ ns == ns }}{{ ns | tojson }}",
    "self-list": "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x }}",
    "large-source": "{# " + "x" * 50_000_000 + " #}",
}
for name, text in templates.items():
    write(f"template-{name}.jinja", text)


# Tokenizers: steps that a library runs on every text.
def folder(name, change):
    path = os.path.join(out, name)
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(model, path)
    change(path)


def tokenizer(name, change):
    def apply(path):
        file = os.path.join(path, "tokenizer.json")
        with open(file) as text:
            value = json.load(text)
        change(value)
        with open(file, "w") as text:
            json.dump(value, text)

    folder(f"tokenizer-{name}", apply)


def step(kind, value):
    return lambda file: file.__setitem__(kind, value)


def of_model(**fields):
    return lambda file: file["model"].update(fields)


replace = lambda pattern, content: {"type": "Replace", "pattern": pattern, "content": content}
tokenizer("doubling", step("normalizer", {"type": "Sequence", "normalizers": [replace({"String": "e"}, "ee")] * 60}))
tokenizer("regex", step("normalizer", replace({"Regex": "(a*)*b|(x+x+)+y"}, "")))
tokenizer("regex-split", step("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "((a|aa)+)+$"}, "behavior": "Isolated", "invert": False}))
tokenizer("regex-large", step("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(((a{1,900}){1,900}){1,900})"}, "behavior": "Isolated", "invert": False}))
tokenizer("metaspace", step("pre_tokenizer", {"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True}))
tokenizer("strip", step("decoder", {"type": "Strip", "content": "e", "start": 18446744073709551615, "stop": 18446744073709551615}))
tokenizer("ctc", step("decoder", {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}))
tokenizer("fixed-length", step("pre_tokenizer", {"type": "FixedLength", "length": 0}))
tokenizer("template", step("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "none", "type_id": 0}}] * 3, "pair": [], "special_tokens": {}}))
tokenizer("template-ids", step("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [], "special_tokens": {"x": {"id": "x", "ids": [1], "tokens": []}}}))
tokenizer("bert", step("post_processor", {"type": "BertProcessing", "sep": ["x", 4294967295], "cls": ["y", 4294967295]}))
tokenizer("roberta", step("post_processor", {"type": "RobertaProcessing", "sep": ["x", 4294967295], "cls": ["y", 4294967295], "trim_offsets": True, "add_prefix_space": True}))
tokenizer("precompiled", step("normalizer", {"type": "Precompiled", "precompiled_charsmap": "////////"}))
tokenizer("precompiled-short", step("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AQ=="}))
tokenizer("precompiled-empty", step("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}))
tokenizer("prefix", of_model(continuing_subword_prefix="x" * 100))
tokenizer("suffix", of_model(end_of_word_suffix="x" * 100))
tokenizer("dropout", of_model(dropout=0.5))
tokenizer("dropout-nan", of_model(dropout=2.0))
tokenizer("merges", of_model(merges=[["e", "none"]]))
tokenizer("unknown", of_model(unk_token="none", vocab={"a": 0}, merges=[]))
tokenizer("ids", of_model(vocab={"a": 4294967295}, merges=[]))
tokenizer("ids-twice", of_model(vocab={"a": 0, "b": 0}, merges=[]))
tokenizer("unigram", step("model", {"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]], "byte_fallback": False}))
tokenizer("unigram-nan", step("model", {"type": "Unigram", "unk_id": 0, "vocab": [["a", 1e308], ["b", -1e308]], "byte_fallback": True}))
tokenizer("unigram-empty", step("model", {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False}))
tokenizer("unigram-empty-piece", step("model", {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0], ["a", 0.0]], "byte_fallback": False}))
tokenizer("wordpiece", step("model", {"type": "WordPiece", "unk_token": "none", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": {"a": 0}}))
tokenizer("wordlevel", step("model", {"type": "WordLevel", "unk_token": "none", "vocab": {"a": 0}}))
tokenizer("truncation", step("truncation", {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}))
tokenizer("padding", step("padding", {"strategy": {"Fixed": 10000000000}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}))
tokenizer("padding-multiple", step("padding", {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}))
tokenizer("added-empty", lambda file: file["added_tokens"].append({"id": 90000, "content": "", "single_word": False, "lstrip": True, "rstrip": True, "normalized": True, "special": False}))
tokenizer("added-id", lambda file: file["added_tokens"].append({"id": 4294967295, "content": "zzz", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}))


# Configurations: sizes from outside.
def config(name, **fields):
    def apply(path):
        file = os.path.join(path, "config.json")
        with open(file) as text:
            value = json.load(text)
        value.update(fields)
        with open(file, "w") as text:
            json.dump(value, text)

    folder(f"config-{name}", apply)


config("layers", num_hidden_layers=2**63 - 1)
config("heads", num_attention_heads=2**20, num_key_value_heads=2**20, head_dim=2**20, hidden_size=2**40)
config("vocabulary", vocab_size=2**62)
config("context", max_position_embeddings=2**63)
config("rope", rope_theta=1e308)
config("rope-factor", rope_scaling={"type": "linear", "factor": 1e308})
config("fewer-layers", num_hidden_layers=1)


# Profiles of some hundred bytes.
def profile(name, length, block, side):
    shape = {"layers": 1, "query_heads": 1, "kv_heads": 1, "head_dim": 2}
    header = {
        "__metadata__": {
            "format": "moa-profile-1",
            "model": json.dumps(shape),
            "info": json.dumps({"objective": "", "data": ""}),
            "lengths": json.dumps({str(length): {"block": block, "samples": 1}}),
        },
        f"influence.{length}": {"dtype": "F64", "shape": [1, 1, side, side], "data_offsets": [0, 8 * side * side]},
    }
    text = json.dumps(header).encode()
    write(f"profile-{name}.safetensors", struct.pack("<Q", len(text)) + text + bytes(8 * side * side))


profile("one-block", 2**62, 2**62, 1)
profile("many-blocks", 2**20, 1, 1)
profile("large-block", 2**31, 2**31, 1)
profile("samples", 64, 32, 2)
write("profile-header.safetensors", struct.pack("<Q", 2**60) + b"{}")
write("profile-nested.safetensors", (lambda text: struct.pack("<Q", len(text)) + text)(b'{"a":' * 100_000))

# Plans.
plan = {"format": "moa-plan", "version": 1, "model": {"layers": 1, "query_heads": 1, "kv_heads": 1, "head_dim": 2}, "sink": 1, "min_span": 2, "rules": [[{"alpha": 0, "beta": 1}]]}
write("plan-good.json", json.dumps(plan))
write("plan-sink.json", json.dumps({**plan, "sink": 2**63, "min_span": 2**64 - 1}))
write("plan-shape.json", json.dumps({**plan, "model": {**plan["model"], "layers": 2**20, "query_heads": 2**20, "kv_heads": 2**20}}))
write("plan-infinite.json", json.dumps(plan).replace('"alpha": 0', '"alpha": 1e999'))
write("plan-nested.json", "[" * 1_000_000)
write("plan-lines.json", json.dumps({**plan, "rules": [[[{"alpha": i, "beta": 0} for i in range(5000)]]]}))
write("plan-escape.json", json.dumps({**plan, "provenance": {"method": "\x1b]0;x\x07\x1b[2J"}}))

# GGUF headers.
write("gguf-tensors.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62))
write("gguf-key.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"general.architecture")
write("gguf-array.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**61))
write("gguf-nested.gguf", b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000)
