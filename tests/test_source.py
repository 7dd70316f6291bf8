"""Tests of metacanary.source."""

import dataclasses

import fake_archives
import numpy as np
import pytest
from fake_archives import make_arrays

from metacanary import data
from metacanary.source import Archive


@pytest.mark.parametrize("name", data.ARRAYS)
def test_verify_refuses_another_value(tmp_path, name):
    digits = data.SOURCES["digits"]
    arrays = {array: values.copy() for array, values in digits.fetch(digits, tmp_path).items()}
    digits.verify(arrays, "here")
    arrays[name].flat[-1] += 1
    with pytest.raises(ValueError, match=f"name='digits': {name} of here has sha256"):
        digits.verify(arrays, "here")


def test_verify_counts_and_prefix():
    arrays = make_arrays(seed=0)
    source = fake_archives.registered("cifar10", arrays, [])
    prefix = {"train_images[:7]": data.sha256(arrays["train_images"][:7])}
    source = dataclasses.replace(source, digests=prefix)
    source.verify(arrays, "here")
    with pytest.raises(ValueError, match=r"test images of shape \(3, 32, 32, 3\), expected \(4, 32, 32, 3\)"):
        source.verify(arrays | {"test_images": arrays["test_images"][:3]}, "here")
    arrays["train_images"][6] += 1
    with pytest.raises(ValueError, match=r"train_images\[:7\]"):
        source.verify(arrays, "here")


def test_verify_takes_known_digests_instead_of_computing_them():
    arrays = make_arrays(seed=0)
    source = fake_archives.registered("cifar10", arrays, [])
    known = dict(source.digests)
    arrays["train_labels"][0] ^= 1
    source.verify(arrays, "here", known)
    with pytest.raises(ValueError, match="test_images of here has sha256 00"):
        source.verify(arrays, "here", known | {"test_images": "00"})


@pytest.mark.parametrize("pins", [{}, {"sha256": "ab"}, {"md5": "cd"}, {"sha256": "ab", "md5": "cd"}])
def test_checksums_are_those_that_are_pinned(pins):
    assert Archive(file_name="tiny.bin", **pins).checksums == pins


def test_sha256_is_of_the_raw_bytes():
    """Of the empty array and of the three bytes abc, as in FIPS 180-2."""
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert data.sha256(np.frombuffer(b"abc", np.uint8)) == abc
    assert data.sha256(np.array([97, 98, 99], np.int32)) == abc
    assert data.sha256(np.frombuffer(b"aXbXcX", np.uint8)[::2]) == abc
