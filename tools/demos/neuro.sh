# Sourced by tools/demo with the function `heed` and the folder `$out`: three systems on made data.
heed sample brain-encoder "$out/data"
heed train brain-encoder --data "$out/data" --out "$out/encoder"
heed evaluate "$out/encoder" --data "$out/data"
heed explain "$out/encoder" "$out/data/test_images" --out "$out/explanations"
heed baselines "$out/data" --backbone.name pixels --backbone.patch 4 --runs "$out/encoder" --out "$out/baselines"
echo
echo "Pictures to look at:"
find "$out/encoder" "$out/explanations" "$out/baselines" -name '*.png' | sort | head -n 14
