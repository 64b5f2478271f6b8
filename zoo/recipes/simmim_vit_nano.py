"""SimMIM on CIFAR-10: 60 % masked in squares of 8 pixels.

    python -m zoo.train simmim_vit_nano --data cifar10_train.tar --out runs/zoo

Not trained yet: it wants a GPU.
"""

from zoo.recipe import Recipe

RECIPE = Recipe(name="simmim_vit_nano", method="simmim", epochs=200, betas=(0.9, 0.999), mask_ratio=0.6, mask_square=2)
