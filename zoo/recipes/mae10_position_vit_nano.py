"""`mae10_vit_nano` with a trained position table, where the paper's is a fixed sine-cosine.

python -m zoo.train mae10_position_vit_nano --data cifar10_train.tar --out runs/zoo
"""

from zoo.recipe import Recipe

RECIPE = Recipe(name="mae10_position_vit_nano", method="mae", epochs=10, position="trained")
