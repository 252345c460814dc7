"""Versions are told, also by a source tree on the path, which has none of its own."""

import pytest

from convai_fast.cli import evaluate
from convai_fast.cli.info import package_version
from convai_fast.cli.main import main


def test_a_package_without_metadata_has_a_version_to_tell():
    told = {name: package_version(name) for name in ("torch", "no-package-of-this-name")}
    assert all(isinstance(version, str) and version for version in told.values())
    assert told["torch"][0].isdecimal()
    assert not told["no-package-of-this-name"][0].isdecimal()
    assert all(package_version(name) for name in evaluate._PACKAGES)


@pytest.mark.parametrize("seed", ["-1", "18446744073709551616"])
def test_a_seed_out_of_range_is_one_sentence_before_anything_is_loaded(seed, capsys):
    for command in (["demo"], ["train", "--data", "absent.json"]):
        assert main([*command, "--seed", seed]) == 2
        assert "--seed must be at" in capsys.readouterr().err
