"""The classes of Mapillary Vistas 1.2 and 2.0: a pixel value is a position in the table.

Source: config_v1.2.json and config_v2.0.json as repeated by public loaders, which agree in order and colors (except
one that sorts v2.0's six traffic lights alphabetically). Classes that the owners do not evaluate are not learned:
1 of 66 and 8 of 124.

The mapping to the 19 Cityscapes classes follows the Cityscapes definitions: markings, bike lanes, crossings and
covers are road; curbs, curb cuts, islands and pedestrian areas are sidewalk; sand is terrain; the back of a sign is
static. Classes that are void or missing in Cityscapes map to none.
"""

from __future__ import annotations

from roadseg.labels import IGNORE, LabelClass, LabelSet

TERMS = "Mapillary Vistas research edition: CC BY-NC-SA, non-commercial research."

# name | color | - if not evaluated | Cityscapes train class. The name's first word is its category.
_V1_2 = """
animal: Bird                              | 165  42  42 |   |
animal: Ground Animal                     |   0 192   0 |   |
construction: Curb                        | 196 196 196 |   | sidewalk
construction: Fence                       | 190 153 153 |   | fence
construction: Guard Rail                  | 180 165 180 |   |
construction: Barrier                     |  90 120 150 |   |
construction: Wall                        | 102 102 156 |   | wall
construction: Bike Lane                   | 128  64 255 |   | road
construction: Crosswalk - Plain           | 140 140 200 |   | road
construction: Curb Cut                    | 170 170 170 |   | sidewalk
construction: Parking                     | 250 170 160 |   |
construction: Pedestrian Area             |  96  96  96 |   | sidewalk
construction: Rail Track                  | 230 150 140 |   |
construction: Road                        | 128  64 128 |   | road
construction: Service Lane                | 110 110 110 |   | road
construction: Sidewalk                    | 244  35 232 |   | sidewalk
construction: Bridge                      | 150 100 100 |   |
construction: Building                    |  70  70  70 |   | building
construction: Tunnel                      | 150 120  90 |   |
human: Person                             | 220  20  60 |   | person
human: Bicyclist                          | 255   0   0 |   | rider
human: Motorcyclist                       | 255   0 100 |   | rider
human: Other Rider                        | 255   0 200 |   | rider
marking: Lane Marking - Crosswalk         | 200 128 128 |   | road
marking: Lane Marking - General           | 255 255 255 |   | road
nature: Mountain                          |  64 170  64 |   |
nature: Sand                              | 230 160  50 |   | terrain
nature: Sky                               |  70 130 180 |   | sky
nature: Snow                              | 190 255 255 |   |
nature: Terrain                           | 152 251 152 |   | terrain
nature: Vegetation                        | 107 142  35 |   | vegetation
nature: Water                             |   0 170  30 |   |
object: Banner                            | 255 255 128 |   |
object: Bench                             | 250   0  30 |   |
object: Bike Rack                         | 100 140 180 |   |
object: Billboard                         | 220 220 220 |   |
object: Catch Basin                       | 220 128 128 |   | road
object: CCTV Camera                       | 222  40  40 |   |
object: Fire Hydrant                      | 100 170  30 |   |
object: Junction Box                      |  40  40  40 |   |
object: Mailbox                           |  33  33  33 |   |
object: Manhole                           | 100 128 160 |   | road
object: Phone Booth                       | 142   0   0 |   |
object: Pothole                           |  70 100 150 |   | road
object: Street Light                      | 210 170 100 |   |
object: Pole                              | 153 153 153 |   | pole
object: Traffic Sign Frame                | 128 128 128 |   |
object: Utility Pole                      |   0   0  80 |   | pole
object: Traffic Light                     | 250 170  30 |   | traffic light
object: Traffic Sign (Back)               | 192 192 192 |   |
object: Traffic Sign (Front)              | 220 220   0 |   | traffic sign
object: Trash Can                         | 140 140  20 |   |
object: Bicycle                           | 119  11  32 |   | bicycle
object: Boat                              | 150   0 255 |   |
object: Bus                               |   0  60 100 |   | bus
object: Car                               |   0   0 142 |   | car
object: Caravan                           |   0   0  90 |   |
object: Motorcycle                        |   0   0 230 |   | motorcycle
object: On Rails                          |   0  80 100 |   | train
object: Other Vehicle                     | 128  64  64 |   |
object: Trailer                           |   0   0 110 |   |
object: Truck                             |   0   0  70 |   | truck
object: Wheeled Slow                      |   0   0 192 |   |
void: Car Mount                           |  32  32  32 |   |
void: Ego Vehicle                         | 120  10  10 |   |
void: Unlabeled                           |   0   0   0 | - |
"""

_V2_0 = """
animal: Bird                              | 165  42  42 |   |
animal: Ground Animal                     |   0 192   0 |   |
construction: Ambiguous Barrier           | 250 170  31 | - |
construction: Concrete Block              | 250 170  32 |   |
construction: Curb                        | 196 196 196 |   | sidewalk
construction: Fence                       | 190 153 153 |   | fence
construction: Guard Rail                  | 180 165 180 |   |
construction: Barrier                     |  90 120 150 |   |
construction: Road Median                 | 250 170  33 |   |
construction: Road Side                   | 250 170  34 |   |
construction: Lane Separator              | 128 128 128 |   |
construction: Temporary Barrier           | 250 170  35 |   |
construction: Wall                        | 102 102 156 |   | wall
construction: Bike Lane                   | 128  64 255 |   | road
construction: Crosswalk - Plain           | 140 140 200 |   | road
construction: Curb Cut                    | 170 170 170 |   | sidewalk
construction: Driveway                    | 250 170  36 |   |
construction: Parking                     | 250 170 160 |   |
construction: Parking Aisle               | 250 170  37 |   |
construction: Pedestrian Area             |  96  96  96 |   | sidewalk
construction: Rail Track                  | 230 150 140 |   |
construction: Road                        | 128  64 128 |   | road
construction: Road Shoulder               | 110 110 110 |   | road
construction: Service Lane                | 110 110 110 |   | road
construction: Sidewalk                    | 244  35 232 |   | sidewalk
construction: Traffic Island              | 128 196 128 |   | sidewalk
construction: Bridge                      | 150 100 100 |   |
construction: Building                    |  70  70  70 |   | building
construction: Garage                      | 150 150 150 |   | building
construction: Tunnel                      | 150 120  90 |   |
human: Person                             | 220  20  60 |   | person
human: Person Group                       | 220  20  60 | - | person
human: Bicyclist                          | 255   0   0 |   | rider
human: Motorcyclist                       | 255   0 100 |   | rider
human: Other Rider                        | 255   0 200 |   | rider
marking: Lane Marking - Dashed Line       | 255 255 255 |   | road
marking: Lane Marking - Straight Line     | 255 255 255 |   | road
marking: Lane Marking - Zigzag Line       | 250 170  29 |   | road
marking: Lane Marking - Ambiguous         | 250 170  28 | - | road
marking: Lane Marking - Arrow (Left)      | 250 170  26 |   | road
marking: Lane Marking - Arrow (Other)     | 250 170  25 |   | road
marking: Lane Marking - Arrow (Right)     | 250 170  24 |   | road
marking: Lane Marking - Arrow (Split Left or Straight)  | 250 170  22 |   | road
marking: Lane Marking - Arrow (Split Right or Straight) | 250 170  21 |   | road
marking: Lane Marking - Arrow (Straight)  | 250 170  20 |   | road
marking: Lane Marking - Crosswalk         | 255 255 255 |   | road
marking: Lane Marking - Give Way (Row)    | 250 170  19 |   | road
marking: Lane Marking - Give Way (Single) | 250 170  18 |   | road
marking: Lane Marking - Hatched (Chevron) | 250 170  12 |   | road
marking: Lane Marking - Hatched (Diagonal) | 250 170  11 |   | road
marking: Lane Marking - Other             | 255 255 255 |   | road
marking: Lane Marking - Stop Line         | 255 255 255 |   | road
marking: Lane Marking - Symbol (Bicycle)  | 250 170  16 |   | road
marking: Lane Marking - Symbol (Other)    | 250 170  15 |   | road
marking: Lane Marking - Text              | 250 170  15 |   | road
marking: Lane Marking (only) - Dashed Line | 255 255 255 |   | road
marking: Lane Marking (only) - Crosswalk  | 255 255 255 |   | road
marking: Lane Marking (only) - Other      | 255 255 255 |   | road
marking: Lane Marking (only) - Test       | 255 255 255 |   | road
nature: Mountain                          |  64 170  64 |   |
nature: Sand                              | 230 160  50 |   | terrain
nature: Sky                               |  70 130 180 |   | sky
nature: Snow                              | 190 255 255 |   |
nature: Terrain                           | 152 251 152 |   | terrain
nature: Vegetation                        | 107 142  35 |   | vegetation
nature: Water                             |   0 170  30 |   |
object: Banner                            | 255 255 128 |   |
object: Bench                             | 250   0  30 |   |
object: Bike Rack                         | 100 140 180 |   |
object: Catch Basin                       | 220 128 128 |   | road
object: CCTV Camera                       | 222  40  40 |   |
object: Fire Hydrant                      | 100 170  30 |   |
object: Junction Box                      |  40  40  40 |   |
object: Mailbox                           |  33  33  33 |   |
object: Manhole                           | 100 128 160 |   | road
object: Parking Meter                     |  20  20 255 |   |
object: Phone Booth                       | 142   0   0 |   |
object: Pothole                           |  70 100 150 |   | road
object: Signage - Advertisement           | 250 171  30 |   |
object: Signage - Ambiguous               | 250 172  30 | - |
object: Signage - Back                    | 250 173  30 |   |
object: Signage - Information             | 250 174  30 |   |
object: Signage - Other                   | 250 175  30 |   |
object: Signage - Store                   | 250 176  30 |   |
object: Street Light                      | 210 170 100 |   |
object: Pole                              | 153 153 153 |   | pole
object: Pole Group                        | 153 153 153 | - |
object: Traffic Sign Frame                | 128 128 128 |   |
object: Utility Pole                      |   0   0  80 |   | pole
object: Traffic Cone                      | 210  60  60 |   |
object: Traffic Light - General (Single)  | 250 170  30 |   | traffic light
object: Traffic Light - Pedestrians       | 250 170  30 |   | traffic light
object: Traffic Light - General (Upright) | 250 170  30 |   | traffic light
object: Traffic Light - General (Horizontal) | 250 170  30 |   | traffic light
object: Traffic Light - Cyclists          | 250 170  30 |   | traffic light
object: Traffic Light - Other             | 250 170  30 |   | traffic light
object: Traffic Sign - Ambiguous          | 192 192 192 | - |
object: Traffic Sign (Back)               | 192 192 192 |   |
object: Traffic Sign - Direction (Back)   | 192 192 192 |   |
object: Traffic Sign - Direction (Front)  | 220 220   0 |   | traffic sign
object: Traffic Sign (Front)              | 220 220   0 |   | traffic sign
object: Traffic Sign - Parking            |   0   0 196 |   | traffic sign
object: Traffic Sign - Temporary (Back)   | 192 192 192 |   |
object: Traffic Sign - Temporary (Front)  | 220 220   0 |   | traffic sign
object: Trash Can                         | 140 140  20 |   |
object: Bicycle                           | 119  11  32 |   | bicycle
object: Boat                              | 150   0 255 |   |
object: Bus                               |   0  60 100 |   | bus
object: Car                               |   0   0 142 |   | car
object: Caravan                           |   0   0  90 |   |
object: Motorcycle                        |   0   0 230 |   | motorcycle
object: On Rails                          |   0  80 100 |   | train
object: Other Vehicle                     | 128  64  64 |   |
object: Trailer                           |   0   0 110 |   |
object: Truck                             |   0   0  70 |   | truck
object: Vehicle Group                     |   0   0 142 | - |
object: Wheeled Slow                      |   0   0 192 |   |
object: Water Valve                       | 170 170 170 |   |
void: Car Mount                           |  32  32  32 |   |
void: Dynamic                             | 111  74   0 |   |
void: Ego Vehicle                         | 120  10  10 |   |
void: Ground                              |  81   0  81 |   |
void: Static                              | 111 111   0 |   |
void: Unlabeled                           |   0   0   0 | - |
"""


def _label_set(name: str, table: str) -> LabelSet:
    classes: list[LabelClass] = []
    learned = 0
    for id_, row in enumerate(table.strip().splitlines()):
        whole, color, left_out, counts_as = (cell.strip() for cell in row.split("|"))
        category, _, readable = whole.partition(": ")
        r, g, b = (int(v) for v in color.split())
        train_id = IGNORE if left_out else learned
        classes.append(LabelClass(readable, id_, train_id, (r, g, b), category, cityscapes=counts_as))
        learned += not left_out
    return LabelSet(name, tuple(classes), TERMS)


V1_2 = _label_set("mapillary-v1.2", _V1_2)
V2_0 = _label_set("mapillary-v2", _V2_0)
