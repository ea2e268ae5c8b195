"""What processes compare, and how a difference is named."""

from __future__ import annotations

import dataclasses

import mixtral_jax as mj
from mixtral_jax import sample
from mixtral_jax.sharding import agreement


def test_every_option_is_a_fact_but_what_belongs_to_one_process():
    asked = sample.Options(prompt=("a",), debug=True)
    facts = agreement.option_facts(asked)
    assert facts["prompt"] == "('a',)"
    assert facts["max-new-tokens"] == "64"  # of nested options too
    assert facts["peer-timeout"] == "10.0"
    assert not {"coordinator", "num-processes", "process-id", "debug"} & facts.keys()
    other = dataclasses.replace(asked, processes=mj.ProcessOptions(process_id=1), debug=False)
    assert agreement.option_facts(other) == facts


def test_long_values_are_short_and_still_differ():
    one, other = agreement.short("x" * 1000 + "a"), agreement.short("x" * 1000 + "b")
    assert one != other
    assert len(one) < 100


def test_files_of_one_size_are_told_apart_by_both_ends(tmp_path):
    large = bytearray(1 << 20)
    for i, place in enumerate((None, 0, -1)):
        (tmp_path / str(i)).mkdir()
        content = bytearray(large)
        if place is not None:
            content[place] = 1
        (tmp_path / str(i) / "model.safetensors").write_bytes(content)
        (tmp_path / str(i) / "README.md").write_text(str(i))  # says nothing about the weights
    facts = [agreement.file_facts(tmp_path / str(i)) for i in range(3)]
    assert len({tuple(each.items()) for each in facts}) == 3
    assert list(facts[0]) == ["the file model.safetensors"]
    assert agreement.file_facts(tmp_path / "absent") == {}


def test_a_difference_names_the_process_and_a_few_of_its_facts():
    first = {f"fact {i}": "a" for i in range(8)}
    assert agreement.difference({0: first, 1: dict(first)}) is None
    line = agreement.difference({0: first, 1: dict(first), 2: {**first, "fact 3": "b"}})
    assert line == "process 2 does not do what process 0 does: fact 3 is b, in process 0 a"
    line = agreement.difference({0: first, 1: {}})
    assert line is not None
    assert "fact 0 is missing, in process 0 a" in line
    assert line.endswith(" and 3 more")
