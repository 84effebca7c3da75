"""The layers that can mix tokens inside the gated hourglass block, by name. `s4d` is the paper's.

Each is a `Mixer`, and has a row in `config/mixers.py`, which says what it is made from.
"""

from diffussm_cli.config import MIXER_FACTS
from diffussm_cli.model.mixer import Mixer, StateSpace
from diffussm_cli.model.mixers.attention import Attention
from diffussm_cli.model.mixers.axial import Axial
from diffussm_cli.model.mixers.conv import Conv
from diffussm_cli.model.mixers.linear import LinearAttention
from diffussm_cli.model.s4d.layer import S4D

MIXERS: dict[str, type[Mixer]] = {
    "s4d": S4D,
    "axial": Axial,
    "linear": LinearAttention,
    "conv": Conv,
    "attention": Attention,
}

_only_once = ", ".join(sorted(MIXERS.keys() ^ MIXER_FACTS.keys()))
assert not _only_once, f"mixer {_only_once}: needs a class here and a row in config/mixers.py"
for _name, _mixer in MIXERS.items():
    assert issubclass(_mixer, StateSpace) == MIXER_FACTS[_name].is_state_space, (
        f"mixer {_name}: is_state_space of its row in config/mixers.py must say whether "
        f"{_mixer.__name__} is a StateSpace"
    )
