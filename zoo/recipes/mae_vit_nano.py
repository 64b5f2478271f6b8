from zoo.recipe import Recipe

RECIPE = Recipe(name="mae_vit_nano", method="mae", epochs=40)
