"""Write the network that runs in the page of chapter 8, and ten test digits, as a script.

    python tools/digit_network.py

The weights are those of a network that ships, as they are stored, in half precision. Beside them
stand the constants of its certificate, from ``lipbook.rounding.forward_error`` at the image 0:
for all images v the float32 program is within ``error + slope * ‖v‖`` of the function, whose
Lipschitz constant is at most ``lipschitz``. The result is ``book/assets/networks/digit.js``: a
script, since a page that is read from a file may load nothing else.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lipbook.lab import networks
from lipbook.rounding import forward_error

SCRIPT = Path(__file__).resolve().parents[1] / "book" / "assets" / "networks" / "digit.js"
NETWORK = "mnist_small/BCOP-StiefelMuon"
ROUND_UP = 1 + 1e-9  # for what is lost when the constants are printed


def encoded(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode("ascii")


def data() -> dict[str, Any]:
    """Give what the page needs: weights and biases, constants, one digit of each kind."""
    model = networks.load(NETWORK)
    images, labels = networks.data(NETWORK)
    bound = forward_error(model, torch.zeros(1, 1, 28, 28))
    layers = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    values = [part.flatten().half() for layer in layers for part in layer.parameters()]
    first = torch.stack([images[labels == digit][0] for digit in range(10)])
    return {
        "name": NETWORK,
        "lipschitz": float(f"{bound.lipschitz * ROUND_UP:.12g}"),
        "error": float(f"{bound.error.item() * ROUND_UP:.12g}"),
        "slope": float(f"{bound.slope * ROUND_UP:.12g}"),
        "shapes": [list(layer.weight.shape) for layer in layers],
        "weights": encoded(torch.cat(values)),
        "examples": encoded((255 * first).round().to(torch.uint8)),
    }


def script() -> str:
    """Text of the script."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in data().items()]
    return "".join(["touch.figures.digit.receive({\n", *lines, "});\n"])


def main() -> None:
    SCRIPT.write_text(script(), encoding="utf-8")


if __name__ == "__main__":
    main()
