"""For each extra, a short program that uses what the extra is for: with small networks, and without a network."""

from __future__ import annotations

PHOTOGRAPHS = """
import convscope
photographs = convscope.samples.photographs()
"""

EXAMPLES = {
    "keras": """
import keras
import convscope
layers = [keras.Input((32, 32, 3)), keras.layers.Conv2D(4, 3, name="conv"), keras.layers.GlobalAveragePooling2D()]
keras.Sequential([*layers, keras.layers.Dense(3)]).save("small.keras")
model = convscope.load("small.keras", preprocessing={"size": 32, "mean": 0, "std": 1})
assert convscope.heatmaps(model, convscope.samples.photographs()[:1], layer="conv").values.shape == (1, 1, 30, 30)
""",
    "lrp": PHOTOGRAPHS
    + """
assert convscope.heatmaps("lite0", photographs[:1], method="lrp-epsilon").values.any()
""",
    "scan": PHOTOGRAPHS
    + """
store = convscope.scan("lite0", photographs, "store", layers=["bn1"], k=2)
assert len(convscope.open_store("store").image_names) == len(photographs)
""",
    "ray": """
import os
import convscope
os.environ["RAY_raylet_start_wait_time_s"] = "180"  # a busy machine starts a cluster slowly
if __name__ == "__main__":
    store = convscope.scan("lite0", convscope.samples.photographs(), "store", layers=["bn1"], k=2, ray="local")
    assert len(store.image_names) == len(convscope.samples.photographs())
""",
    "atlas": PHOTOGRAPHS
    + """
assert convscope.atlas("lite0", photographs, layer="blocks.6", grid=2, min_count=1, steps=4).figure()
""",
    "concepts": PHOTOGRAPHS
    + """
assert convscope.concepts("lite0", 3 * photographs, "lesser panda", count=2).figure()
""",
    "hf": PHOTOGRAPHS
    + """
from transformers import ViTConfig, ViTForImageClassification
config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64)
ViTForImageClassification(config).save_pretrained("vit")
model = convscope.load("hf:vit", preprocessing={"size": 64, "mean": 0.5, "std": 0.5})
assert convscope.heatmaps(model, photographs[:1]).values.shape == (1, 1, 4, 4)
""",
    "onnx": PHOTOGRAPHS
    + """
import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper
weight = numpy_helper.from_array(numpy.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype("float32"), "weight")
nodes = [
    helper.make_node("Conv", ["image", "weight"], ["maps"], name="conv", kernel_shape=[3, 3]),
    helper.make_node("GlobalAveragePool", ["maps"], ["means"]),
    helper.make_node("Flatten", ["means"], ["scores"]),
]
values = [
    helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    for name, shape in (("image", [1, 3, 32, 32]), ("scores", [1, 4]))
]
graph = helper.make_graph(nodes, "small", values[:1], values[1:], [weight])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), "small.onnx")
model = convscope.load("small.onnx", preprocessing={"size": 32, "mean": 0, "std": 1})
assert convscope.heatmaps(model, photographs[:1], method="saliency").values.any()
""",
    "clip": PHOTOGRAPHS
    + """
model = convscope.load("open_clip:RN50", weights="random", classes=["cat", "dog"], template="a photo of a {}")
assert convscope.predict(model, photographs[:1]).names[0][0] in ("cat", "dog")
""",
    "video": PHOTOGRAPHS
    + """
import pathlib
import subprocess
import sys
import imageio.v3
import numpy
from PIL import Image
images = [Image.open(photograph).convert("RGB").resize((64, 64)) for photograph in photographs]
frames = [numpy.asarray(image) for image in images]
imageio.v3.imwrite("film.mp4", frames, plugin="pyav", codec="libx264", fps=2)
command = [sys.executable, "-m", "convscope", "heatmap", "lite0", "film.mp4", "--frames", "2", "-o", "heatmaps"]
subprocess.run(command, check=True)
assert list(pathlib.Path("heatmaps").glob("*.mp4"))
""",
    "serve": """
import urllib.request
import convscope
explorer = convscope.show("lite0", port=0)
assert b"lite0" in urllib.request.urlopen(explorer.url).read()
explorer.close()
""",
    "mcp": """
import sys
import anyio
from mcp import Client, StdioServerParameters


async def main():
    parameters = StdioServerParameters(command=sys.executable, args=["-m", "convscope", "mcp", "lite0"])
    async with Client(parameters) as client:
        result = await client.call_tool("predict", {"images": ["red_panda.jpg"]})
        assert "lesser panda" in str(result)


anyio.run(main)
""",
    "jupyter": """
import convscope
from convscope.explorer.app import create_app
from convscope.explorer.jupyter.in_process import InProcessServer
from convscope.explorer.jupyter.widget import ExplorerWidget, make_snapshot
from convscope.explorer.service.state import Explorer
explorer = Explorer({"lite0": convscope.load("lite0")})
explorer.add_samples()
server = InProcessServer(create_app(explorer))
assert ExplorerWidget(server, 500, make_snapshot(server)).comm is not None
server.close()
""",
}
