"""The page's gallery: pixels are exact, and canaries are chosen by what they leak."""

import base64
import io

import numpy as np
import pytest
import report_results
from PIL import Image

from metacanary import report_data, report_gallery


def leaks(canary=report_results.HOSTILE):
    found = report_data.leaks(report_results.shown_scores())
    return found[(found["canary"] == canary) & (found["training"] == "sgd")]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels)) / np.float32(255)
    address = report_gallery.png(image)
    kind, _, data = address.partition(",")
    assert kind == "data:image/png;base64"
    read = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(read.reshape(image.shape), np.rint(image * 255).astype(int))
    assert address == report_gallery.png(image.copy())


def test_png_refuses_other_channels():
    with pytest.raises(ValueError, match=r"image has shape \(4, 4, 2\), expected"):
        report_gallery.png(np.zeros((4, 4, 2)))


def test_limits_keep_the_page_small():
    assert report_gallery.limits((16, 16, 1), 3) == (18, 6)
    most, least = report_gallery.limits((64, 64, 3), 5)
    assert (most, least) == (7, 2)
    assert 2 * 5 * (most + least) * 64 * 64 * 3 <= report_gallery.MAX_BYTES
    assert report_gallery.limits((512, 512, 3), 9) == (3, 1)


def test_chosen_are_the_ends_of_the_order_or_all():
    table = leaks()
    most, least = report_gallery.chosen(table, 4, 2)
    assert most["canary_id"].tolist() == table["canary_id"].tolist()[:4]
    assert least["canary_id"].tolist() == table["canary_id"].tolist()[-2:]
    most, least = report_gallery.chosen(table, 28, 2)
    assert (len(most), len(least)) == (30, 0)


def test_cards_say_what_the_canary_is():
    table, (canaries, names) = leaks(), report_results.pictures()["digits", report_results.HOSTILE]
    largest = table["leak"].max()
    cards = report_gallery.cards(table, canaries, names, largest)
    assert [card.canary_id for card in cards] == table["canary_id"].tolist()
    for card, row in zip(cards, table.to_dict("records"), strict=True):
        at = card.canary_id
        assert card.source_index == at + 100
        assert (card.label, card.source_label) == (names[at % 3], names[(at + 1) % 3])
        assert card.after == report_gallery.png(canaries.images[at])
        assert card.before == report_gallery.png(canaries.source_images[at])
        assert card.bar == pytest.approx(100 * max(row["leak"], 0) / largest if np.isfinite(row["leak"]) else 0)
    assert max(card.bar for card in cards) == pytest.approx(100)


def test_cards_show_an_unchanged_picture_once():
    canaries, names = report_results.pictures()["digits", "random"]
    assert {card.before for card in report_gallery.cards(leaks("random"), canaries, names, 1.0)} == {""}
