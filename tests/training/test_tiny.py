"""What the tiny world's networks are before they have learnt anything: such that they can."""

import torch
from transformers import CLIPTextModel

from training.scenes import scene
from training.tiny.models import make_text_encoder, make_tokenizer, make_vae, text_config


def test_latents_say_more_about_pictures_than_their_noise():
    torch.manual_seed(0)
    pictures = torch.stack([torch.from_numpy(scene(i, size=64).rgba).permute(2, 0, 1)[:3] for i in range(4)])
    with torch.no_grad():
        posterior = make_vae().encode(2 * pictures - 1).latent_dist
    assert posterior.mean.std() > 10 * posterior.std.mean()


def test_words_change_what_stands_in_their_place():
    """By more than half of how much places differ."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    encoder = make_text_encoder(CLIPTextModel, text_config(tokenizer)).eval()
    captions = [f"a solid red star at the {place}" for place in ("left", "right")]
    words = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        left, right = encoder(words).last_hidden_state
    [place] = (words[0] != words[1]).nonzero().flatten()
    assert (left - right)[place].std() > 0.5 * left.std()
