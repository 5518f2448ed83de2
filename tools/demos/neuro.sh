# Sourced by tools/demo with the function `heed` and the folder `$out`: three systems on made data.
heed sample brain-encoder "$out/data"
heed train brain-encoder --data "$out/data" --out "$out/encoder"
heed evaluate "$out/encoder" --data "$out/data"
heed explain "$out/encoder" "$out/data/test_images" --out "$out/explanations"
heed baselines "$out/data" --backbone.name pixels --backbone.patch 4 --runs "$out/encoder" --out "$out/baselines"
heed simulate "blocking: 20 A+ | 20 AB+ | B?" "control: 20 AB+ | B?" --rule delta hebb --out "$out/schedules"
heed train icl --out "$out/icl" --trainer.max-steps 1000
heed evaluate "$out/icl"
echo
echo "Pictures to look at:"
find "$out/encoder" "$out/explanations" "$out/baselines" "$out/schedules" "$out/icl" -name '*.png' | sort | head -n 14
