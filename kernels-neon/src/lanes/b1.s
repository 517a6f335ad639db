// One step of 32 rows of B1 an iteration: 4 blocks, of which 32 bytes at x0 each, and 4 blocks of tables at x1; x2 steps, x5 is 64.
// v27: 15 in every byte. Sums: see `sums_of` in lanes.rs; v4-v7, then v28-v31.
//
// In the order in which one would write it: of each block of nibbles n = v & 15 and v >> 4; tbl of low and high parts by n; add for
// all groups but the first; at last saddw.
2:
    ld1 {v0.16b, v1.16b}, [x0], x5
    and v2.16b, v0.16b, v27.16b
    ushr v0.16b, v0.16b, #4
    ushr v3.16b, v1.16b, #4
    ld1 {v8.16b, v9.16b, v10.16b, v11.16b}, [x1], #64
    tbl v12.16b, {v10.16b}, v0.16b
    tbl v0.16b, {v11.16b}, v0.16b
    tbl v10.16b, {v10.16b}, v3.16b
    tbl v13.16b, {v9.16b}, v2.16b
    add v0.16b, v13.16b, v0.16b
    tbl v3.16b, {v11.16b}, v3.16b
    tbl v2.16b, {v8.16b}, v2.16b
    add v2.16b, v2.16b, v12.16b
    ld1 {v11.16b, v12.16b, v13.16b, v14.16b}, [x1], #64
    ld1 {v15.16b, v16.16b, v17.16b, v18.16b}, [x1], #64
    and v1.16b, v1.16b, v27.16b
    tbl v8.16b, {v8.16b}, v1.16b
    add v8.16b, v8.16b, v10.16b
    tbl v1.16b, {v9.16b}, v1.16b
    add v1.16b, v1.16b, v3.16b
    ld1 {v9.16b, v10.16b}, [x0], x5
    and v3.16b, v10.16b, v27.16b
    and v19.16b, v9.16b, v27.16b
    tbl v20.16b, {v11.16b}, v19.16b
    ushr v9.16b, v9.16b, #4
    tbl v21.16b, {v12.16b}, v3.16b
    tbl v22.16b, {v13.16b}, v9.16b
    tbl v3.16b, {v11.16b}, v3.16b
    tbl v9.16b, {v14.16b}, v9.16b
    tbl v11.16b, {v12.16b}, v19.16b
    add v2.16b, v2.16b, v20.16b
    ld1 {v19.16b, v20.16b}, [x0], x5
    and v12.16b, v19.16b, v27.16b
    tbl v23.16b, {v16.16b}, v12.16b
    ushr v19.16b, v19.16b, #4
    tbl v24.16b, {v17.16b}, v19.16b
    tbl v12.16b, {v15.16b}, v12.16b
    ushr v10.16b, v10.16b, #4
    tbl v14.16b, {v14.16b}, v10.16b
    tbl v10.16b, {v13.16b}, v10.16b
    add v2.16b, v2.16b, v22.16b
    tbl v13.16b, {v18.16b}, v19.16b
    add v0.16b, v0.16b, v11.16b
    add v0.16b, v0.16b, v9.16b
    add v3.16b, v8.16b, v3.16b
    add v3.16b, v3.16b, v10.16b
    ld1 {v8.16b, v9.16b, v10.16b, v11.16b}, [x1], #64
    ushr v19.16b, v20.16b, #4
    tbl v18.16b, {v18.16b}, v19.16b
    tbl v17.16b, {v17.16b}, v19.16b
    and v19.16b, v20.16b, v27.16b
    tbl v15.16b, {v15.16b}, v19.16b
    tbl v16.16b, {v16.16b}, v19.16b
    add v2.16b, v2.16b, v12.16b
    add v1.16b, v1.16b, v21.16b
    add v2.16b, v2.16b, v24.16b
    ld1 {v19.16b, v20.16b}, [x0], x5
    and v12.16b, v20.16b, v27.16b
    and v21.16b, v19.16b, v27.16b
    tbl v22.16b, {v9.16b}, v21.16b
    tbl v21.16b, {v8.16b}, v21.16b
    ushr v19.16b, v19.16b, #4
    tbl v24.16b, {v10.16b}, v19.16b
    tbl v19.16b, {v11.16b}, v19.16b
    tbl v9.16b, {v9.16b}, v12.16b
    ushr v20.16b, v20.16b, #4
    tbl v11.16b, {v11.16b}, v20.16b
    add v0.16b, v0.16b, v23.16b
    add v0.16b, v0.16b, v13.16b
    add v0.16b, v0.16b, v22.16b
    add v0.16b, v0.16b, v19.16b
    tbl v8.16b, {v8.16b}, v12.16b
    add v1.16b, v1.16b, v14.16b
    add v1.16b, v1.16b, v16.16b
    add v1.16b, v1.16b, v18.16b
    add v1.16b, v1.16b, v9.16b
    add v3.16b, v3.16b, v15.16b
    add v3.16b, v3.16b, v17.16b
    add v3.16b, v3.16b, v8.16b
    saddw2 v7.8h, v7.8h, v0.16b
    tbl v8.16b, {v10.16b}, v20.16b
    add v2.16b, v2.16b, v21.16b
    add v2.16b, v2.16b, v24.16b
    saddw v4.8h, v4.8h, v2.8b
    saddw2 v5.8h, v5.8h, v2.16b
    add v2.16b, v3.16b, v8.16b
    saddw v28.8h, v28.8h, v2.8b
    saddw2 v29.8h, v29.8h, v2.16b
    add v1.16b, v1.16b, v11.16b
    saddw v30.8h, v30.8h, v1.8b
    saddw2 v31.8h, v31.8h, v1.16b
    saddw v6.8h, v6.8h, v0.8b
    subs x2, x2, #1
    b.ne 2b
