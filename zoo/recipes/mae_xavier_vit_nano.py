"""`mae10_vit_nano` begun as MAE's own code begins: Xavier-uniform matrices, [cls] of deviation 0.02.

python -m zoo.train mae_xavier_vit_nano --data cifar10_train.tar --out runs/zoo
"""

from zoo.recipe import Recipe

RECIPE = Recipe(name="mae_xavier_vit_nano", method="mae", epochs=10, initial="xavier")
