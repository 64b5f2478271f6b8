from zoo.recipe import Recipe

RECIPE = Recipe(name="supervised_vit_nano", method="supervised", epochs=10, betas=(0.9, 0.999))
