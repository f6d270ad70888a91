"""Short common words for folders, files, keys, values and rooms. The tokenizer has a piece for each."""

WORDS = tuple(
    """
    acorn alder amber anvil apple arrow ash aspen atlas badge bamboo barley basil beach bell birch bison blade bloom
    boat bone brick bridge brook brush cabin camel candle canyon castle cedar chain chalk cherry cliff cloud clover
    coal cobalt comet copper coral cotton cove crane crater creek crow crown crystal daisy dawn delta desert dove
    dragon drum dune eagle earth echo elder elm ember falcon fern field finch flame flint forest fossil fox frost
    garden ginger glass glider gold grain granite grape gravel grove harbor hawk hazel helm heron hill honey horn
    ice indigo iris iron island ivory jade jasper juniper kelp kite lagoon lake lamp larch laurel lava leaf lemon
    lentil lily lime linen lion lotus lynx magnet mango maple marble marsh meadow mint mirror mist moon moss myrtle
    nest nickel north oak oasis ocean olive onyx opal orbit orchid otter owl paper pearl pebble pepper pine planet
    plum pond poppy prism quartz quill rain raven reef ridge river robin rocket rope rose ruby saddle saffron sage
    salt sand satin shell silk silver slate snow spark spruce star stone storm straw sugar summit sunset swan table
    thorn thunder tide tiger timber topaz torch tower trail tulip tundra turtle valley velvet violet walnut water
    wave whale wheat willow wind winter wolf wren yarrow zinc
    """.split()  # noqa: SIM905
)
