"""Names of weights that a model may hold although nothing here reads them, and the refusal of all others.

Every name in a weight file is read into a network, or matches `IGNORED`, or ends in a `ModelError`. A weight that is
dropped without a word gives wrong images: a LoRA that has no effect, an eight-bit weight without its scale.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from smooth_rt.errors import ModelError

__all__ = ["IGNORED", "check_dtypes", "check_unused", "is_ignored"]

TRAINING = (
    r"^(model_ema\.|loss\.|logvar$)|^(optimizer(_states)?|lr_schedulers?|callbacks|loops|hyper_parameters"
    r"|global_step|epoch|iteration)(\.|$)"
)
SCHEDULE = (
    "betas|alphas?_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|sigmas|log_sigmas"
    "|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|lvlb_weights"
    "|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2"
)
# Names that change no image, by the part that they belong to, each with its reason. Names are those inside the part,
# without a checkpoint's prefix; "checkpoint" is for what belongs to no part.
IGNORED: dict[str, tuple[tuple[str, str], ...]] = {
    "text_encoder": (
        (r"(^|\.)position_ids$", "a buffer: the positions 0, 1, 2, ..."),
        (r"^(vision_model|visual_projection|visual)\.", "CLIP's image encoder; prompts do not pass it"),
        (r"^text_projection(\.weight)?$", "projects the pooled text; the UNet takes the text's hidden states"),
        (r"^logit_scale$", "weighs text against images in CLIP's training"),
        (r"^attn_mask$", "OpenCLIP's buffer of the causal mask, which the network makes itself"),
        (r"^transformer\.resblocks\.23\.", "OpenCLIP's last layer; SD2.x takes the text after the layer before it"),
    ),
    "unet": (),
    "vae": ((TRAINING, "the discriminator, the averages and the state of training"),),
    "checkpoint": (
        (TRAINING, "averages of the UNet's weights (the plain ones are used, as in diffusers) and the training state"),
        (rf"^({SCHEDULE})$|^denoiser\.", "the noise schedule as tables; the scheduler computes them"),
        (r"^(v_pred|ztsnr)$", "markers, which `smooth_rt.markers` reads"),
        (r"^safety_checker\.", "the safety checker, which is not run"),
    ),
}

# Other names by their form: what they are, and what to do about them. The first that matches is named.
BLOCKS = r"(^|\.)(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block|layers|resblocks|down|up)\."
FORMS = (
    (
        r"(^|[._])lora($|[._])|_lora\b|\.base_layer\.|\b(hada_|lokr_|oft_|dora_|ia3_|magnitude_vector)",
        "LoRA weights",
        "fuse them into the model, or name the LoRA with --lora",
    ),
    (
        r"(^|\.)(scaled_fp8|comfy_quant|scale_(weight|input)|(weight|input)_scale(_\w+)?)$"
        r"|\.(absmax|quant_map|nested_\w+|SCB|weight_format|qweight|qzeros|g_idx|scales|zero_point)$|quant_state",
        "scales of quantised weights",
        "name a model in 16 or 32 bits",
    ),
    (r"(^|\.)(ip_adapter|image_proj|encoder_hid_proj)\.|_ip\b", "an IP-Adapter", "name the model without it"),
    (
        r"\.processor\.|custom_diffusion",
        "weights of attention processors",
        "fuse them into the model, or name it without them",
    ),
    (r"embedding_manager\.|string_to_param", "textual inversion embeddings", "name the model without them"),
    (r"motion_modules|temporal|time_stack", "a video model's layers", "name an image model"),
    (r"position_net\.|\.fuser\.", "GLIGEN's layers", "name the model without them"),
    (
        r"(add_embedding|class_embedding|label_emb|cond_proj)\b",
        "embeddings of conditions other than text and time",
        "name a model of text alone",
    ),
    (BLOCKS, "of layers that the config does not have", "name the config it was saved with"),
)
UNKNOWN = ("nothing here reads them", "name a model without them")

# What a weight may be stored in: each of its numbers is the weight's own. Others need scales or tables.
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def is_ignored(part: str, key: str) -> bool:
    """Return whether the weight `key` of a part changes no image, so that it may go unread."""
    return any(re.search(pattern, key) for pattern, _ in IGNORED[part])


def check_unused(source: str, keys: Collection[str]) -> None:
    """Refuse weights that no network reads.

    Args:
        source: the file or folder that holds them, for the message.
        keys: names that no network reads, without those that are ignored.

    Raises:
        ModelError: there is one. It gives their number, the first of them, what they look like and what to do.
    """
    if not keys:
        return
    names, (what, advice) = sorted(keys), UNKNOWN
    for pattern, *form in FORMS:
        telling = [name for name in names if re.search(pattern, name)]
        if telling:
            names, (what, advice) = telling + [name for name in names if name not in telling], form
            break
    shown = names[:3] if sum(map(len, names[:3])) < 120 else [names[0][-90:]]
    more = ", ..." if len(names) > len(shown) else ""
    count = "1 weight" if len(names) == 1 else f"{len(names)} weights"
    raise ModelError(f"{source}: {count} would be ignored ({', '.join(shown)}{more}): {what}; {advice}")


def check_dtypes(source: str, dtypes: Mapping[str, str]) -> None:
    """Refuse weights whose stored numbers are not the weights' own, as those of quantised models.

    Args:
        source: the file or folder that holds them, for the message.
        dtypes: type of each weight that a network reads, by its name.

    Raises:
        ModelError: a type is no floating-point one.
    """
    quantised = next((key for key, dtype in dtypes.items() if dtype not in FLOATS), None)
    if quantised is not None:
        raise ModelError(
            f"{source}: the weight {quantised[-90:]} is stored as {dtypes[quantised]}, as quantised models are; "
            "name a model in 16 or 32 bits"
        )
