"""Pictures by matplotlib: into a file, without a window, and with text as it stands."""

import contextlib
import io
import os

from machinery.errors import BadInput

# A folder may be called $x$. Whatever the user's own settings are, that is no formula.
TEXT_AS_IT_STANDS = {"text.parse_math": False, "text.usetex": False}


def load_matplotlib():
    """The module matplotlib. BadInput says how to get it where it is missing."""
    # A notebook names its own backend here. Where that is not installed, importing
    # matplotlib would already fail.
    os.environ["MPLBACKEND"] = "agg"
    try:
        import matplotlib.figure
    except ImportError as error:
        raise BadInput(
            f"a picture needs matplotlib ({error}):"
            " pip install -r requirements-extra.txt"
        ) from error
    return matplotlib


@contextlib.contextmanager
def new_figure(width: float, height: float, spines: bool = True):
    """A context with an empty figure of this size, in inches.

    spines: draw the upper and the right side of its axes, too. Raises BadInput without
    matplotlib.
    """
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(TEXT_AS_IT_STANDS):
        matplotlib.rcParams["axes.spines.top"] = spines
        matplotlib.rcParams["axes.spines.right"] = spines
        yield matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def save_small(figure, path) -> None:
    """Save it as a PNG of 64 colours: a third of the bytes, where it is mostly text."""
    from PIL import Image  # matplotlib brings it

    large = io.BytesIO()
    figure.savefig(large, format="png", dpi=100)
    picture = Image.open(large).convert("RGB")
    picture.quantize(64).save(path, "PNG", optimize=True)
