"""I-JEPA on CIFAR-10: no [cls].

    python -m zoo.train ijepa_vit_nano --data cifar10_train.tar --out runs/zoo

Not trained yet: it wants a GPU.
"""

from zoo.recipe import Recipe, bundled_architecture

RECIPE = Recipe(
    name="ijepa_vit_nano",
    method="ijepa",
    epochs=200,
    betas=(0.9, 0.999),
    architecture=bundled_architecture("vit_nano_gap_patch4_32"),
    momentum=0.996,
    decoder_depth=4,
)
