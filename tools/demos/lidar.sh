# Sourced by tools/demo with the function `heed` and the folder `$out`: find curbs in streets that it makes itself.
heed sample curbnet "$out/data"
heed check curbnet "$out/data"
heed train curbnet --data "$out/data" --out "$out/run" --trainer.max-epochs 24 \
    --trainer.validate-every 8
heed evaluate "$out/run" --data "$out/data"
heed predict "$out/run" "$out/data/sequences/11" --out "$out/predictions"
heed explain "$out/run" "$out/data/sequences/11/velodyne/000000.bin" --out "$out/explanations"
heed train classical --data "$out/data" --out "$out/classical"
heed evaluate "$out/classical" --data "$out/data"
echo
echo "Pictures to look at:"
find "$out/run" "$out/predictions" "$out/explanations" -name '*.png' -not -path '*/data/*' | sort | head -n 14
