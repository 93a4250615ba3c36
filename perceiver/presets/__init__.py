"""Named experiments: each a function that returns an `Experiment` and shows only what differs from the defaults.

`perceiver presets` prints their table. Architectures and recipes are those of the published examples of
krasserm/perceiver-io and of the Perceiver papers (arXiv 2103.03206, 2107.14795, 2202.07765).
"""

from collections.abc import Callable

from perceiver.config import Experiment
from perceiver.presets.arrays import forecast_seasons, points_shapes
from perceiver.presets.audio import audio_clf_esc50, audio_clf_small
from perceiver.presets.flow import optical_flow, optical_flow_small
from perceiver.presets.images import img_clf, img_clf_imagenet, img_clf_mnist, img_tags, quickstart
from perceiver.presets.multimodal import multimodal_kinetics, multimodal_small
from perceiver.presets.music import sam_giantmidi, sam_maestro, sam_small
from perceiver.presets.sequences import copy_131072, copy_small, img_ar_imagenet64, img_ar_mnist
from perceiver.presets.tables import table_heads, tables
from perceiver.presets.text import (
    clm_c4,
    clm_c4_small,
    clm_wikitext,
    clm_wikitext_small,
    mlm_imdb,
    mlm_imdb_small,
    txt_clf,
    txt_clf_imdb_all,
    txt_clf_imdb_all_small,
    txt_clf_imdb_decoder,
    txt_clf_imdb_decoder_small,
    txt_tags,
)

PRESETS: dict[str, Callable[[], Experiment]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        quickstart,
        img_clf_mnist,
        clm_wikitext,
        clm_wikitext_small,
        mlm_imdb,
        mlm_imdb_small,
        txt_clf_imdb_decoder,
        txt_clf_imdb_decoder_small,
        txt_clf_imdb_all,
        txt_clf_imdb_all_small,
        clm_c4,
        clm_c4_small,
        sam_maestro,
        sam_giantmidi,
        sam_small,
        copy_small,
        copy_131072,
        img_ar_mnist,
        img_ar_imagenet64,
        img_clf_imagenet,
        optical_flow,
        optical_flow_small,
        multimodal_kinetics,
        multimodal_small,
        tables,
        table_heads,
        forecast_seasons,
        points_shapes,
        audio_clf_small,
        audio_clf_esc50,
        img_clf,
        txt_clf,
        img_tags,
        txt_tags,
    )
}
