"""What a configuration knows of each layer that can mix tokens. The layers themselves need torch,
and are in `model/mixers`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MixerFacts:
    """A row of `MIXER_FACTS`.

    Attributes:
        fields: the fields of `model` that it is made from, beside hidden_size and scan. It gets
            these and no others.
        reads_in_order: whether the order of the tokens counts, so that `model.scan` changes what it
            computes.
        needs_image: whether every token must have a place in the image, so that there are no text
            tokens.
        is_state_space: whether its class is a `StateSpace`, so that `train.ssm_lr` caps its rate.
    """

    fields: tuple[str, ...]
    reads_in_order: bool
    needs_image: bool
    is_state_space: bool


MIXER_FACTS = {
    "s4d": MixerFacts(
        fields=("d_state",), reads_in_order=True, needs_image=False, is_state_space=True
    ),
    "axial": MixerFacts(
        fields=("d_state",), reads_in_order=False, needs_image=True, is_state_space=True
    ),
    "linear": MixerFacts(
        fields=("heads",), reads_in_order=True, needs_image=False, is_state_space=False
    ),
    "conv": MixerFacts(
        fields=("kernel", "conv_gate"),
        reads_in_order=False,
        needs_image=True,
        is_state_space=False,
    ),
    "attention": MixerFacts(
        fields=("heads", "qk_norm", "rope"),
        reads_in_order=False,
        needs_image=False,
        is_state_space=False,
    ),
}
# The fields of `model` that only some mixers are made from.
MIXER_FIELDS = tuple(dict.fromkeys(name for row in MIXER_FACTS.values() for name in row.fields))


def mixer_names(text: str) -> list[str]:
    """The names in a list of mixers such as `conv,axial`."""
    return [name.strip() for name in text.split(",")]


def mixers_with(field: str) -> list[str]:
    """The mixers that are made from a field of `model`."""
    return [name for name, row in MIXER_FACTS.items() if field in row.fields]
