// The two transforms of a 3x3 convolution by Winograd's minimal filtering (export/rewrites/winograd.py has the whole and
// the matrices): of inputs, B^T d B, and of outputs, A^T m A. Between them stand (m + 2)^2 matrix products.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.hpp"

namespace smooth_rt {

constexpr int LARGEST_SIDE = 8;

// [rows, columns]
struct Matrix {
    int rows = 0, columns = 0;
    std::vector<float> values;
    float at(int i, int j) const { return values[i * columns + j]; }
};

// to = matrix * from * matrix^T, of vectors; `from` and `to` have rows of LARGEST_SIDE.
inline void both_sides(const Matrix& matrix, const Vec (*from)[LARGEST_SIDE], Vec (*to)[LARGEST_SIDE]) {
    Vec half[LARGEST_SIDE][LARGEST_SIDE];
    for (int i = 0; i < matrix.rows; ++i)
        for (int j = 0; j < matrix.columns; ++j) {
            Vec sum = Vec{};
            for (int k = 0; k < matrix.columns; ++k) sum += matrix.at(i, k) * from[k][j];
            half[i][j] = sum;
        }
    for (int i = 0; i < matrix.rows; ++i)
        for (int j = 0; j < matrix.rows; ++j) {
            Vec sum = Vec{};
            for (int k = 0; k < matrix.columns; ++k) sum += half[i][k] * matrix.at(j, k);
            to[i][j] = sum;
        }
}

// One row of tiles of one picture [channels, height, width]; each of `cells` is [across, channels] of that row. Lanes
// are channels, so that a tile's numbers are whole registers: a block of channels is turned first, in the first cache.
inline void transform_inputs(const Matrix& matrix, const float* image, int64_t height, int64_t width, int64_t channels,
                             int64_t tile_row, const std::vector<float*>& cells) {
    const int side = matrix.rows, size = side - 2;
    const int64_t across = (width + size - 1) / size, columns = across * size + 2;
    std::vector<float> turned(side * columns * LANES);  // [side, columns, LANES], a column of zeros first
    for (int64_t c = 0; c < channels; c += LANES) {
        const int64_t count = std::min<int64_t>(LANES, channels - c);
        for (int i = 0; i < side; ++i) {
            const int64_t row = tile_row * size + i - 1;
            if (row < 0 || row >= height) continue;  // zeros, as they are for every block of channels
            for (int64_t lane = 0; lane < count; ++lane) {
                const float* from = image + ((c + lane) * height + row) * width;
                float* to = turned.data() + (i * columns + 1) * LANES + lane;
                for (int64_t x = 0; x < width; ++x) to[x * LANES] = from[x];
            }
        }
        for (int64_t x = 0; x < across; ++x) {
            Vec tile[LARGEST_SIDE][LARGEST_SIDE], found[LARGEST_SIDE][LARGEST_SIDE];
            for (int i = 0; i < side; ++i)
                for (int j = 0; j < side; ++j)
                    tile[i][j] = *(const Vec*)(turned.data() + (i * columns + x * size + j) * LANES);
            both_sides(matrix, tile, found);
            for (int i = 0; i < side; ++i)
                for (int j = 0; j < side; ++j) {
                    float* to = cells[i * side + j] + x * channels + c;
                    if (count == LANES) *(Vec*)to = found[i][j];
                    else for (int64_t lane = 0; lane < count; ++lane) to[lane] = found[i][j][lane];
                }
        }
    }
}

// The other way about: `image` is written.
inline void transform_outputs(const Matrix& matrix, const std::vector<const float*>& cells, int64_t height,
                              int64_t width, int64_t channels, int64_t tile_row, float* image) {
    const int size = matrix.rows, side = matrix.columns;
    const int64_t across = (width + size - 1) / size, columns = across * size;
    std::vector<float> turned(size * columns * LANES);  // [size, columns, LANES]
    for (int64_t c = 0; c < channels; c += LANES) {
        const int64_t count = std::min<int64_t>(LANES, channels - c);
        for (int64_t x = 0; x < across; ++x) {
            Vec tile[LARGEST_SIDE][LARGEST_SIDE] = {}, found[LARGEST_SIDE][LARGEST_SIDE];
            for (int i = 0; i < side; ++i)
                for (int j = 0; j < side; ++j) {
                    const float* from = cells[i * side + j] + x * channels + c;
                    if (count == LANES) tile[i][j] = *(const Vec*)from;
                    else for (int64_t lane = 0; lane < count; ++lane) tile[i][j][lane] = from[lane];
                }
            both_sides(matrix, tile, found);
            for (int i = 0; i < size; ++i)
                for (int j = 0; j < size; ++j) *(Vec*)(turned.data() + (i * columns + x * size + j) * LANES) = found[i][j];
        }
        for (int i = 0; i < size && tile_row * size + i < height; ++i)
            for (int64_t lane = 0; lane < count; ++lane) {
                const float* from = turned.data() + i * columns * LANES + lane;
                float* to = image + ((c + lane) * height + tile_row * size + i) * width;
                for (int64_t x = 0; x < width; ++x) to[x] = from[x * LANES];
            }
    }
}

}  // namespace smooth_rt
