"""CLIP whole: both towers, from transformers' weights and from open_clip's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixgrpo_jax.models import clip
from mixgrpo_jax.models.clip import CLIPConfig, open_clip
from mixgrpo_jax.models.clip import vision as vision
from mixgrpo_jax.models.clip.text import CLIPTextConfig
from mixgrpo_jax.models.clip.vision import CLIPVisionConfig
from mixgrpo_jax.models.io import weights

torch = pytest.importorskip("torch")


def sizes(width, depth, heads, act, **others):
    return dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        hidden_act=act,
        **others,
    )


def make_config(text, image, act, projection, image_size, patch_size, vocab=50, length=12):
    """`text` and `image` are (width, depth, heads)."""
    ids = dict(vocab_size=vocab, max_position_embeddings=length, eos_token_id=vocab - 1)
    pixels = dict(image_size=image_size, patch_size=patch_size)
    return CLIPConfig(
        CLIPTextConfig(**sizes(*text, act, projection_dim=projection, **ids)),
        CLIPVisionConfig(**sizes(*image, act, projection_dim=projection, **pixels)),
    )


CONFIGS = {
    "exact gelu, heads of 80": make_config((64, 2, 1), (160, 3, 2), "gelu", 48, 28, 7),
    "quick gelu": make_config((24, 3, 2), (40, 2, 5), "quick_gelu", 17, 36, 4),
    "one patch": make_config((16, 1, 4), (12, 1, 1), "gelu", 8, 6, 6, vocab=9, length=77),
}
FLOAT32 = 1e-5

embed_text = jax.jit(clip.embed_text, static_argnums=0, static_argnames="dtype")
embed_images = jax.jit(clip.embed_images, static_argnums=0, static_argnames="dtype")


def inputs_for(config, batch=3):
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(batch, config.vision.image_size, config.vision.image_size, 3)).astype(np.float32)
    tokens = rng.integers(0, config.text.vocab_size - 1, (batch, config.text.max_position_embeddings)).astype(np.int32)
    tokens[np.arange(batch), 2 + np.arange(batch)] = config.text.eos_token_id
    return pixels, tokens


def to_torch(pixels, tokens):
    return torch.tensor(pixels.transpose(0, 3, 1, 2)), torch.tensor(tokens, dtype=torch.int64)


def randomise(model):
    """Every parameter random: fresh biases are zero and fresh norms are one, and would hide an error."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    return model.eval()


@functools.cache
def hf_model(config):
    transformers = pytest.importorskip("transformers")
    text = dataclasses.asdict(config.text) | dict(bos_token_id=0, pad_token_id=1)
    both = transformers.CLIPConfig(
        text_config=text, vision_config=dataclasses.asdict(config.vision), projection_dim=config.text.projection_dim
    )
    return randomise(transformers.CLIPModel(both))


class OpenCLIP(torch.nn.Module):
    """open_clip's CLIP restated on torch's own modules, which name its tensors."""

    def __init__(self, config):
        super().__init__()
        text, image = config.text, config.vision
        self.visual = torch.nn.Module()
        self.visual.class_embedding = torch.nn.Parameter(torch.zeros(image.hidden_size))
        self.visual.positional_embedding = torch.nn.Parameter(torch.zeros(image.tokens, image.hidden_size))
        self.visual.proj = torch.nn.Parameter(torch.zeros(image.hidden_size, image.projection_dim))
        self.visual.conv1 = torch.nn.Conv2d(3, image.hidden_size, image.patch_size, image.patch_size, bias=False)
        self.visual.ln_pre = torch.nn.LayerNorm(image.hidden_size)
        self.visual.transformer = self.tower(image)
        self.visual.ln_post = torch.nn.LayerNorm(image.hidden_size)
        self.transformer = self.tower(text)
        self.token_embedding = torch.nn.Embedding(text.vocab_size, text.hidden_size)
        self.positional_embedding = torch.nn.Parameter(torch.zeros(text.max_position_embeddings, text.hidden_size))
        self.ln_final = torch.nn.LayerNorm(text.hidden_size)
        self.text_projection = torch.nn.Parameter(torch.zeros(text.hidden_size, text.projection_dim))
        self.logit_scale = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
        self.quick = text.hidden_act == "quick_gelu"

    @staticmethod
    def tower(config):
        def block():
            d = config.hidden_size
            layer = torch.nn.Module()
            layer.ln_1, layer.ln_2 = torch.nn.LayerNorm(d), torch.nn.LayerNorm(d)
            layer.attn = torch.nn.MultiheadAttention(d, config.num_attention_heads, batch_first=True)
            layer.mlp = torch.nn.Module()
            layer.mlp.c_fc, layer.mlp.c_proj = torch.nn.Linear(d, 4 * d), torch.nn.Linear(4 * d, d)
            return layer

        tower = torch.nn.Module()
        tower.resblocks = torch.nn.ModuleList(block() for _ in range(config.num_hidden_layers))
        return tower

    def run(self, tower, x, mask=None):
        for block in tower.resblocks:
            h = block.ln_1(x)
            x = x + block.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
            h = block.mlp.c_fc(block.ln_2(x))
            h = h * torch.sigmoid(1.702 * h) if self.quick else torch.nn.functional.gelu(h)
            x = x + block.mlp.c_proj(h)
        return x

    def get_image_features(self, pixels):
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1) + v.positional_embedding
        return v.ln_post(self.run(v.transformer, v.ln_pre(x))[:, 0]) @ v.proj

    def get_text_features(self, tokens):
        mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
        x = self.run(self.transformer, self.token_embedding(tokens) + self.positional_embedding, mask)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


@functools.cache
def open_clip_model(config):
    return randomise(OpenCLIP(config))


MODELS = {"transformers": (hf_model, clip.table), "open_clip": (open_clip_model, open_clip.table)}


def arrays(model):
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def expected_embeddings(model, pixels, tokens):
    """Unit vectors of the pictures and of the texts."""
    pixels, tokens = to_torch(pixels, tokens)
    with torch.no_grad():
        features = [model.get_image_features(pixels), model.get_text_features(tokens)]
    tensors = [getattr(feature, "pooler_output", feature) for feature in features]
    return [torch.nn.functional.normalize(tensor, dim=-1).numpy() for tensor in tensors]


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("layout", MODELS)
@pytest.mark.parametrize("name", CONFIGS)
def test_released_weights_give_the_same_embeddings(name, layout):
    config, (reference, table) = CONFIGS[name], MODELS[layout]
    model, inputs = reference(config), inputs_for(CONFIGS[name])
    params = clip.load(config, arrays(model), rules=table())
    assert open_clip.rules_for(arrays(model)) == table()
    expected = expected_embeddings(model, *inputs)
    ours = embed_images(config, params, inputs[0]), embed_text(config, params, inputs[1])
    assert [embedding.shape for embedding in ours] == 2 * [(3, config.text.projection_dim)]
    assert max(map(relative_error, ours, expected)) < FLOAT32
    np.testing.assert_allclose(params["logit_scale"], np.log(1 / 0.07), rtol=0.01)


def test_transformers_opens_what_we_export():
    config = CONFIGS["quick gelu"]
    theirs = arrays(hf_model(config))
    exported = weights.export(clip.table(), clip.load(config, theirs))
    assert exported.keys() == theirs.keys() - set(clip.IGNORED)
    for name, tensor in exported.items():
        np.testing.assert_array_equal(tensor, theirs[name])


@pytest.mark.parametrize("layout", MODELS)
def test_bf16_embeddings_stay_near_and_the_scale_stays_fp32(layout):
    config, (reference, table) = CONFIGS["exact gelu, heads of 80"], MODELS[layout]
    model, inputs = reference(config), inputs_for(config)
    params = clip.load(config, arrays(model), rules=table(), dtype=jnp.bfloat16)
    exact = clip.load(config, arrays(model), rules=table())
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact) | {"logit_scale": exact["logit_scale"]}
    assert exact["logit_scale"].dtype == np.float32
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, rounded)
    expected = expected_embeddings(model, *inputs)
    ours = [
        embed_images(config, params, inputs[0], dtype=jnp.bfloat16),
        embed_text(config, params, inputs[1], dtype=jnp.bfloat16),
    ]
    for embedding, other in zip(ours, expected):
        assert embedding.dtype == jnp.float32
        assert 1e-4 < relative_error(embedding, other) < 0.1
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=-1), 1, rtol=1e-6)


def test_parts_are_read_alone_but_checked_whole():
    config = CONFIGS["quick gelu"]
    tensors = arrays(hf_model(config))
    assert clip.load(config, tensors, parts=("vision",)).keys() == {"vision"}
    del tensors["text_model.final_layer_norm.bias"]
    with pytest.raises(ValueError, match=r"missing tensors: text_model\.final_layer_norm\.bias"):
        clip.load(config, tensors, parts=("vision",))


@pytest.mark.parametrize(
    "layout, tensor", [("transformers", "visual_projection.weight"), ("open_clip", "visual.positional_embedding")]
)
def test_tensors_that_do_not_fit_are_named(layout, tensor):
    config, (reference, table) = CONFIGS["exact gelu, heads of 80"], MODELS[layout]
    tensors = arrays(reference(config))
    with pytest.raises(ValueError, match=rf"tensor {tensor} has shape .* expects"):
        clip.load(config, tensors | {tensor: tensors[tensor][:-1]}, rules=table())
    with pytest.raises(ValueError, match=r"unexpected tensors: logit_bias"):
        clip.load(config, tensors | {"logit_bias": np.zeros(())}, rules=table())


@pytest.mark.parametrize(
    "config, count",
    [(clip.clip_h14(), 986_109_441), (clip.clip_h14_378_quickgelu(), 986_714_881), (clip.clip_l14(), 427_616_513)],
)
def test_published_models_have_their_published_size(config, count):
    shapes = jax.eval_shape(functools.partial(clip.init, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_patches_are_those_of_a_convolution():
    pixels = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(5, 3, 4, 4)).astype(np.float32)
    expected = torch.nn.functional.conv2d(torch.tensor(pixels.transpose(0, 3, 1, 2)), torch.tensor(kernel), stride=4)
    ours = vision.patches(jnp.asarray(pixels), 4) @ kernel.transpose(vision.PATCH_AXES).reshape(-1, 5)
    np.testing.assert_allclose(ours, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_fresh_models_have_clips_scales():
    config = clip.clip_tiny()
    params = jax.jit(clip.init, static_argnums=0)(config, jax.random.key(0))
    np.testing.assert_allclose(np.exp(params["logit_scale"]), 1 / 0.07, rtol=1e-6)
    for tower, sizes in (("text", config.text), ("vision", config.vision)):
        blocks, d = params[tower]["blocks"], sizes.hidden_size
        residual = (2 * sizes.num_hidden_layers * d) ** -0.5
        stds = dict.fromkeys("qkv", d**-0.5) | {"mlp_in": (2 * d) ** -0.5}
        for layer, std in (stds | {"attention_out": residual, "mlp_out": residual}).items():
            assert blocks[layer]["kernel"].std() == pytest.approx(std, rel=0.05), (tower, layer)
            assert not blocks[layer]["bias"].any()
    assert params["text"]["embedding"].std() == pytest.approx(0.02, rel=0.05)
    assert params["text"]["positions"].std() == pytest.approx(0.01, rel=0.05)


def test_fresh_models_tell_inputs_apart():
    config = clip.clip_tiny()
    params = jax.jit(clip.init, static_argnums=0)(config, jax.random.key(0))
    pixels, tokens = inputs_for(config)
    order = [2, 0, 1]
    for embed, inputs, cosine in ((embed_images, pixels, 0.98), (embed_text, tokens, 0.8)):
        embedding = np.asarray(embed(config, params, inputs))
        assert embedding.shape == (3, 24)
        assert (embedding @ embedding.T)[~np.eye(3, dtype=bool)].max() < cosine
        np.testing.assert_allclose(embed(config, params, inputs[order]), embedding[order], atol=1e-5)


def test_what_cannot_be_is_named():
    config = clip.clip_tiny()
    with pytest.raises(ValueError, match="image_size=30 must be a multiple of patch_size=7"):
        clip.clip_tiny(image_size=30)
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        clip.clip_tiny(hidden_act="relu")
    with pytest.raises(ValueError, match=r"text.projection_dim=24 and vision.projection_dim=8"):
        CLIPConfig(config.text, dataclasses.replace(config.vision, projection_dim=8))
    with pytest.raises(ValueError, match=r"pixels have shape \(1, 14, 14, 3\).*expects \[B, 28, 28, 3\]"):
        vision.apply(config.vision, {}, jnp.zeros((1, 14, 14, 3)))
