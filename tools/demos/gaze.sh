# Sourced by tools/demo with the function `heed` and the folder `$out`: search shelves and pictures that it makes itself.
heed sample oat "$out/shelves"
heed train oat --data "$out/shelves" --out "$out/oat" --trainer.max-epochs 3
heed evaluate "$out/oat" --data "$out/shelves"
heed predict "$out/oat" "$out/shelves" --out "$out/predictions"
heed ceiling "$out/shelves" --out "$out/ceiling"
heed view "$out/shelves" --out "$out/views"
heed stimuli --out "$out/stimuli"
echo
echo "Pictures to look at:"
find "$out/oat" "$out/predictions" "$out/ceiling" "$out/views" -name '*.png' | sort | head -n 14
