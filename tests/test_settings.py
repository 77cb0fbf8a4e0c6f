"""What a user can set in Jupyter Server."""

import dataclasses
from pathlib import Path

import pytest
from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Float, TraitError
from traitlets.config import Config

from fastwire.flow import Limits
from fastwire.settings import MOST, Fastwire, usable


def test_every_setting_reaches_the_relay(tmp_path: Path) -> None:
    """What `Limits` has and a user may set."""
    for field in dataclasses.fields(Limits):
        if Fastwire.class_traits(config=True).get(field.name):
            value = {bool: field.default is False, str: str(tmp_path)}.get(type(field.default), 77_777)
            settings = Fastwire(config=Config({"Fastwire": {field.name: value}}))
            defaults = dataclasses.replace(Limits(), spill_dir=jupyter_runtime_dir())
            assert settings.limits() == dataclasses.replace(defaults, **{field.name: value})


def test_no_setting_is_negative() -> None:
    """-1 is often a word for "no limit": here it is refused, by name."""
    for field in dataclasses.fields(Limits):
        if type(field.default) in (int, float) and Fastwire.class_traits(config=True).get(field.name):
            with pytest.raises(TraitError, match=field.name):
                Fastwire(config=Config({"Fastwire": {field.name: -1}}))


@pytest.mark.parametrize("value", [float("nan"), 10**20])
def test_no_setting_is_without_end(value: float) -> None:
    """No timer can be set to it, and the core's words do not have it: it is refused at the start, and not by each
    client's connection."""
    for field in dataclasses.fields(Limits):
        if type(field.default) in (int, float) and Fastwire.class_traits(config=True).get(field.name):
            with pytest.raises(TraitError, match=field.name):
                Fastwire(config=Config({"Fastwire": {field.name: value}}))


def test_never_is_as_long_as_can_be() -> None:
    """No timer is set to infinity itself."""
    for name, trait in Fastwire.class_traits(config=True).items():
        if isinstance(trait, Float):
            settings = Fastwire(config=Config({"Fastwire": {name: float("inf")}}))
            assert getattr(settings.limits(), name) == MOST


def test_who_sets_what_is_no_more_is_told(caplog: pytest.LogCaptureFixture) -> None:
    Fastwire(config=Config({"Fastwire": {"detached_sessions": 4}}))
    assert "detached_sessions has no effect any more" in caplog.text


def test_a_client_may_have_a_reply_waiting() -> None:
    with pytest.raises(TraitError, match=r"client_memory_limit.* 65536"):
        Fastwire(config=Config({"Fastwire": {"client_memory_limit": 0}}))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm")
def test_memory_is_no_place_to_spill_to(caplog: pytest.LogCaptureFixture) -> None:
    on_disk = Limits(spill_dir=str(Path(__file__).parent))
    assert usable(on_disk) is on_disk
    assert usable(Limits(spill_dir="/dev/shm")).spill_dir == ""
    assert usable(Limits(spill_dir="/missing")).spill_dir == ""
    assert ["tmpfs" in record.message for record in caplog.records] == [True, False]
