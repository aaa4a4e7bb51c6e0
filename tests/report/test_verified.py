"""Verification in the report: ROC curves, the threshold, and the pairs judged wrongly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manyviews.evaluators.compare import compare
from manyviews.evaluators.protocol import ProtocolSettings
from manyviews.evaluators.verification import Pairs, ThresholdDetails, VerificationSettings, threshold_text
from manyviews.report import Findings, write_report
from manyviews.report.plots import as_svg
from manyviews.report.verified import judged_pictures, verified_of
from report_findings import findings


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Pairs of test images and of training images, of which the noisier features mistake more."""
    made = findings(tmp_path_factory.mktemp("verified") / "run")
    assert made.test is not None
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([torch.randperm(150, generator=generator)[:2] for _ in range(400)])
    # Image i is of class i modulo 3, of test images as of training images, which follow the 60.
    same = (images[:, 0] % 3) == (images[:, 1] % 3)
    pairs = Pairs(images, same, torch.arange(400) % 4, "my pairs.csv")
    protocol = ProtocolSettings(verification=VerificationSettings(folds=4))
    labels = made.train.labels, made.test.labels
    evaluation = compare(made.features, *labels, protocol, tasks=("verification",), pairs=pairs)
    return made._replace(evaluation=evaluation)


def test_the_threshold_and_the_wrong_pairs_are_those_of_the_leading_features(given: Findings) -> None:
    verified = verified_of(given)
    assert verified is not None
    assert (verified.pairs, verified.source) == (400, "my pairs.csv")
    own = next(given.evaluation.of("verification", features="learned", metric="threshold"))
    assert verified.threshold == threshold_text(own)
    assert f"cosine {own.value:.4g} (95 % {own.low:.4g} to {own.high:.4g})" in verified.threshold
    train, test = given.features["learned"]
    assert train is not None
    rows = torch.nn.functional.normalize(torch.cat([test, train]).double(), dim=1)
    (_, _, accepted), (_, _, rejected) = verified.wrong
    for pairs, kept, wrong in ((accepted, 1, False), (rejected, -1, True)):
        cosines = [at for *_, at in pairs]
        assert 1 <= len(pairs) <= 8
        assert cosines == sorted(cosines, reverse=kept == 1)
        for first, second, at in pairs:
            assert at == pytest.approx(float(rows[first] @ rows[second]), abs=1e-6)
            assert (first % 3 == second % 3) == wrong
            assert (at > own.value) != wrong


def test_the_page_has_the_curves_and_the_pictures_of_both_sides(given: Findings) -> None:
    verified = verified_of(given)
    assert verified is not None
    pictures = judged_pictures(given, verified, 12)
    assert given.test is not None
    for image, (uri, name, label) in pictures.items():
        assert uri.startswith("data:image/jpeg")
        assert name == (given.test.names[image] if image < 60 else given.train.names[image - 60])
        assert label == ("boot", "coat", "dress")[image % 3]
    page = write_report(given).read_text()
    section = page.partition('<section id="verification"')[2].partition("</section>")[0]
    assert "ROC curves of 400 pairs of my pairs.csv" in section
    assert verified.threshold in section
    assert section.count("<img ") == 2 * sum(len(pairs) for *_, pairs in verified.wrong)
    for own in given.evaluation.of("verification", metric="EER"):
        assert f"EER {100 * own.value:.1f} %" in section


def test_each_kind_has_a_curve_with_its_equal_error_rate_on_it(given: Findings) -> None:
    verified = verified_of(given)
    assert verified is not None
    (axes,) = verified.figure.axes
    # The dotted line of equal errors first, then a curve and a point of each kind, with an empty line for the legend.
    assert axes.get_xscale() == "log"
    for number, kind in enumerate(given.features):
        curve, point = axes.lines[1 + 3 * number], axes.lines[2 + 3 * number]
        (own,) = given.evaluation.of("verification", features=kind, metric="EER")
        assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((own.value, 1 - own.value))
        (threshold,) = given.evaluation.of("verification", features=kind, metric="threshold")
        details = ThresholdDetails.model_validate(threshold.details)
        assert list(curve.get_ydata()) == [0.0, *details.curve.true_accepts]
    marked = axes.lines[-1].get_xdata()[0]
    (own,) = given.evaluation.of("verification", features="learned", metric="threshold")
    assert marked == pytest.approx(own.details["false_accepts"])
    assert as_svg(verified.figure, "ROC curves") == as_svg(verified.figure, "ROC curves")


def test_without_verification_or_with_a_malformed_record_there_is_no_section(given: Findings, tmp_path: Path) -> None:
    measurements = given.evaluation.measurements
    broken = tuple(replace(own, details={"curve": []}) if own.metric == "threshold" else own for own in measurements)
    for kept in (broken, tuple(own for own in measurements if own.metric != "threshold")):
        changed = given._replace(evaluation=replace(given.evaluation, measurements=kept))
        assert verified_of(changed) is None
        assert 'id="verification"' not in write_report(changed, tmp_path).read_text()


def test_pairs_of_images_that_are_not_there_are_left_out(given: Findings) -> None:
    (own,) = given.evaluation.of("verification", features="learned", metric="threshold")
    strange = replace(own, details=own.details | {"wrongly_accepted": [(0, 1, 0.5), (0, 150, 0.5), (-1, 2, 0.5)]})
    others = tuple(one for one in given.evaluation.measurements if one is not own)
    verified = verified_of(given._replace(evaluation=replace(given.evaluation, measurements=(*others, strange))))
    assert verified is not None
    assert verified.wrong[0][2] == ((0, 1, 0.5),)
