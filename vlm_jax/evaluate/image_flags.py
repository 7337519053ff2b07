"""Flags of `evaluate --task fid` and `--task reconstruction`, apart from the command's own; see evaluate.image_command."""

from vlm_jax.flag_kinds import many, number, text

COMPARING = (
    many("images", "folder, image file, pattern, .txt list or shards; repeat for several"),
    text("reference", "", "the images, or with fid the statistics (.npz), that --images are compared with"),
    text("weights", "", "FID's Inception network, pt_inception-2015-12-05-6726825d.pth"),
    text("statistics", "", "with fid: npz file to write for mean and covariance of --images"),
    number("dims", 2048, "features of the network: 64, 192, 768 or 2048"),
    many("lpips", "with reconstruction: weights of VGG-16; repeat for the linear heads of LPIPS"),
    text("crop", "", "with reconstruction: centre_box, centre, squash or pad; default: the tokenizer's own"),
    number("size", 0, "with reconstruction: pixels per side; default: the tokenizer's resolution"),
    text("compat", "", "ssim_range_2 or rfid_double_rescale: a defect of published evaluations"),
)
