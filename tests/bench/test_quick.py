"""A whole quick run: every figure is there and consistent. No assertion on how long anything took."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cases import MEASURED
from bench.results import MorphResult, NetworkResult, Report

pytestmark = pytest.mark.slow  # .ci/run makes a quick benchmark of the default model, and these in a step of their own
ENGINES = {"eager", "openvino"}
PEERS = {"diffusers", "openvino-genai"}


def test_every_network_engine_and_batch_size_is_there(report: Report) -> None:
    found = {(result.network, result.engine, result.images) for result in report.networks}
    assert found == {(name, engine, size) for name in MEASURED for engine in ENGINES for size in (1, 2)}
    assert {(result.engine, result.batch_size) for result in report.morph} == {(e, n) for e in ENGINES for n in (1, 2)}
    peers = ENGINES | PEERS
    assert {(result.engine, result.images) for result in report.generate} == {(e, n) for e in peers for n in (1, 2)}


def test_a_guided_unet_step_doubles_the_batch(report: Report) -> None:
    assert {(r.images, r.rows) for r in report.networks if r.network == "unet"} == {(1, 2), (2, 4)}
    assert all(r.rows == r.images for r in report.networks if r.network != "unet")


def test_every_output_was_compared_and_held(report: Report) -> None:
    for result in report.networks:
        assert len(result.parity) == 1
        assert all(parity.relative <= parity.tolerance for parity in result.parity)
        # Another program than torch rounds otherwise: an exact zero would mean that torch was compared with itself.
        exact = all(parity.max_abs == 0 for parity in result.parity)
        assert exact == (result.engine == "eager")


def test_floors_follow_from_counted_flop_and_the_ceiling(report: Report) -> None:
    rate = report.ceiling.gflop_per_s * 1e9
    results: list[NetworkResult | MorphResult] = [*report.networks, *report.morph]
    for result in results:
        assert result.flop > 0
        assert result.floor_s == pytest.approx(result.flop / rate)
        assert result.times_floor == pytest.approx(result.timing.median_s / result.floor_s)


def test_the_morph_is_the_sum_of_its_calls(report: Report) -> None:
    row = {result.network: result.flop / result.rows for result in report.networks}
    settings = report.settings
    frame = settings.steps * 2 * row["unet"] + row["vae_decoder"]
    for result in report.morph:
        assert result.flop == 2 * row["text_encoder"] + settings.frames * frame
        assert result.frames_per_s == pytest.approx(settings.frames / result.timing.median_s)


def test_images_are_diffusers_own(report: Report) -> None:
    for result in report.generate:
        assert result.psnr_db is None or result.psnr_db >= 40
    assert not [warning for warning in report.warnings if "dB" in warning]


def test_speed_up_is_a_ratio_within_the_run(report: Report) -> None:
    peer = {result.images: result.timing.median_s for result in report.generate if result.engine == "diffusers"}
    for result in report.generate:
        assert result.speedup == pytest.approx(peer[result.images] / result.timing.median_s)
        assert result.images_per_s == pytest.approx(result.images / result.timing.median_s)


def test_memory_is_of_the_right_order_and_rises_with_the_batch(report: Report) -> None:
    for engine in ENGINES:
        peaks = [result.peak_memory_bytes for result in report.morph if result.engine == engine]
        assert all(100e6 < peak < 10e9 for peak in peaks)
        assert peaks == sorted(peaks)


def test_both_files_are_written_and_nothing_else(quick_run: Path, report: Report) -> None:
    assert sorted(path.name for path in quick_run.iterdir()) == ["bench.json", "bench.md"]
    assert report.settings.model in (quick_run / "bench.md").read_text()
