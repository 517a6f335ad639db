// One step of 32 rows of TL an iteration: 5 blocks, of which 32 bytes at x0 each, and 4 blocks of tables at x1; x2 steps, x5 is 64.
// v27: 15 in every byte; v8, v9, v10: 0x40, 0x20, 0x10. Sums: see `sums_of` in lanes.rs; v4-v7, then v28-v31.
//
// In the order in which one would write it: of each block of nibbles n = v & 15 and v >> 4; tbl of low and high parts by n; the mask
// of signs by cmlt (top bit) and cmtst (the next three), after four groups of signs << 4; uabd for the first group, uaba for the
// others; at last saddw.
2:
    ld1 {v0.16b, v1.16b}, [x0], x5
    cmtst v2.16b, v0.16b, v8.16b
    ld1 {v11.16b, v12.16b}, [x0], x5
    ushr v3.16b, v12.16b, #4
    cmlt v13.16b, v0.16b, #0
    and v14.16b, v11.16b, v27.16b
    cmlt v15.16b, v1.16b, #0
    ld1 {v16.16b, v17.16b}, [x0], x5
    and v18.16b, v17.16b, v27.16b
    and v19.16b, v16.16b, v27.16b
    ushr v11.16b, v11.16b, #4
    and v12.16b, v12.16b, v27.16b
    ld1 {v20.16b, v21.16b, v22.16b, v23.16b}, [x1], #64
    tbl v24.16b, {v21.16b}, v12.16b
    tbl v25.16b, {v23.16b}, v11.16b
    tbl v26.16b, {v20.16b}, v14.16b
    uabd v24.16b, v24.16b, v15.16b
    tbl v14.16b, {v21.16b}, v14.16b
    uabd v14.16b, v14.16b, v13.16b
    uaba v14.16b, v25.16b, v2.16b
    tbl v21.16b, {v23.16b}, v3.16b
    tbl v12.16b, {v20.16b}, v12.16b
    tbl v11.16b, {v22.16b}, v11.16b
    uabd v13.16b, v26.16b, v13.16b
    uaba v13.16b, v11.16b, v2.16b
    tbl v2.16b, {v22.16b}, v3.16b
    cmtst v3.16b, v0.16b, v9.16b
    ushr v11.16b, v16.16b, #4
    cmtst v16.16b, v0.16b, v10.16b
    uabd v12.16b, v12.16b, v15.16b
    ushr v15.16b, v17.16b, #4
    cmtst v17.16b, v1.16b, v8.16b
    uaba v12.16b, v2.16b, v17.16b
    uaba v24.16b, v21.16b, v17.16b
    ld1 {v20.16b, v21.16b, v22.16b, v23.16b}, [x1], #64
    tbl v2.16b, {v21.16b}, v19.16b
    tbl v17.16b, {v22.16b}, v15.16b
    tbl v21.16b, {v21.16b}, v18.16b
    tbl v18.16b, {v20.16b}, v18.16b
    tbl v22.16b, {v22.16b}, v11.16b
    tbl v15.16b, {v23.16b}, v15.16b
    cmtst v25.16b, v1.16b, v10.16b
    tbl v19.16b, {v20.16b}, v19.16b
    uaba v13.16b, v19.16b, v3.16b
    tbl v11.16b, {v23.16b}, v11.16b
    uaba v13.16b, v22.16b, v16.16b
    cmtst v19.16b, v1.16b, v9.16b
    uaba v12.16b, v18.16b, v19.16b
    uaba v12.16b, v17.16b, v25.16b
    uaba v24.16b, v21.16b, v19.16b
    ld1 {v17.16b, v18.16b, v19.16b, v20.16b}, [x1], #64
    shl v1.16b, v1.16b, #4
    cmlt v21.16b, v1.16b, #0
    uaba v14.16b, v2.16b, v3.16b
    uaba v14.16b, v11.16b, v16.16b
    ld1 {v2.16b, v3.16b}, [x0], x5
    ushr v11.16b, v3.16b, #4
    and v16.16b, v2.16b, v27.16b
    tbl v22.16b, {v17.16b}, v16.16b
    tbl v23.16b, {v19.16b}, v11.16b
    and v3.16b, v3.16b, v27.16b
    tbl v17.16b, {v17.16b}, v3.16b
    tbl v3.16b, {v18.16b}, v3.16b
    ushr v2.16b, v2.16b, #4
    tbl v16.16b, {v18.16b}, v16.16b
    tbl v18.16b, {v20.16b}, v2.16b
    shl v0.16b, v0.16b, #4
    cmtst v26.16b, v0.16b, v8.16b
    uaba v12.16b, v17.16b, v21.16b
    cmtst v17.16b, v1.16b, v9.16b
    tbl v2.16b, {v19.16b}, v2.16b
    cmtst v19.16b, v1.16b, v8.16b
    uaba v12.16b, v23.16b, v19.16b
    uaba v24.16b, v15.16b, v25.16b
    uaba v24.16b, v3.16b, v21.16b
    cmtst v1.16b, v1.16b, v10.16b
    cmlt v3.16b, v0.16b, #0
    uaba v13.16b, v22.16b, v3.16b
    uaba v14.16b, v16.16b, v3.16b
    uaba v14.16b, v18.16b, v26.16b
    tbl v3.16b, {v20.16b}, v11.16b
    uaba v24.16b, v3.16b, v19.16b
    ld1 {v15.16b, v16.16b}, [x0], x5
    and v3.16b, v16.16b, v27.16b
    and v11.16b, v15.16b, v27.16b
    uaba v13.16b, v2.16b, v26.16b
    ld1 {v18.16b, v19.16b, v20.16b, v21.16b}, [x1], #64
    tbl v2.16b, {v18.16b}, v11.16b
    tbl v18.16b, {v18.16b}, v3.16b
    tbl v11.16b, {v19.16b}, v11.16b
    ushr v16.16b, v16.16b, #4
    ushr v15.16b, v15.16b, #4
    tbl v22.16b, {v20.16b}, v15.16b
    tbl v3.16b, {v19.16b}, v3.16b
    uaba v24.16b, v3.16b, v17.16b
    cmtst v3.16b, v0.16b, v9.16b
    uaba v13.16b, v2.16b, v3.16b
    tbl v2.16b, {v20.16b}, v16.16b
    tbl v15.16b, {v21.16b}, v15.16b
    uaba v12.16b, v18.16b, v17.16b
    uaba v14.16b, v11.16b, v3.16b
    tbl v3.16b, {v21.16b}, v16.16b
    cmtst v0.16b, v0.16b, v10.16b
    uaba v14.16b, v15.16b, v0.16b
    saddw2 v7.8h, v7.8h, v14.16b
    uaba v13.16b, v22.16b, v0.16b
    saddw2 v5.8h, v5.8h, v13.16b
    saddw v4.8h, v4.8h, v13.8b
    uaba v24.16b, v3.16b, v1.16b
    saddw v30.8h, v30.8h, v24.8b
    saddw v6.8h, v6.8h, v14.8b
    saddw2 v31.8h, v31.8h, v24.16b
    uaba v12.16b, v2.16b, v1.16b
    saddw2 v29.8h, v29.8h, v12.16b
    saddw v28.8h, v28.8h, v12.8b
    subs x2, x2, #1
    b.ne 2b
