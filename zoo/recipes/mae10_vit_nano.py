"""A masked autoencoder on as many images as the other methods here had: `mae_vit_nano`, 10 epochs instead of 40.

python -m zoo.train mae10_vit_nano --data cifar10_train.tar --out runs/zoo
"""

from zoo.recipe import Recipe

RECIPE = Recipe(name="mae10_vit_nano", method="mae", epochs=10)
