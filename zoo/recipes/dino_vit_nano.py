"""DINO on CIFAR-10: two views of 32 pixels, no small crops.

    python -m zoo.train dino_vit_nano --data cifar10_train.tar --out runs/zoo

Not trained yet: it wants a GPU.
"""

from zoo.recipe import Recipe

RECIPE = Recipe(
    name="dino_vit_nano",
    method="dino",
    epochs=200,
    weight_decay=0.04,
    betas=(0.9, 0.999),
    gradient_clip=3.0,
    crop_scale=(0.25, 1.0),
    momentum=0.996,
)
