"""MoCo v3 on CIFAR-10: two views of 32 pixels, so in 5 epochs as many views as 10 epochs of one view have.

python -m zoo.train mocov3_vit_nano --data cifar10_train.tar --out runs/zoo
"""

from zoo.recipe import Recipe

RECIPE = Recipe(name="mocov3_vit_nano", method="mocov3", epochs=5, weight_decay=0.1, crop_scale=(0.2, 1.0))
